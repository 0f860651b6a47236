"""vLLM answers no request without the key, apart from /health."""

from __future__ import annotations

import ast
import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from longhaul.serving import require_key
from longhaul.serving.require_key import RequireKey

KEY = "0123456789abcdef"
RIGHT = [(b"host", b"n1"), (b"authorization", f"Bearer {KEY}".encode())]


def answers(monkeypatch: pytest.MonkeyPatch, **scope: Any) -> list[dict[str, Any]]:
    """Return what a client gets; the application behind the check sends `passed`."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def app(*_: Any) -> None:
        await send({"type": "passed"})

    asyncio.run(RequireKey(app)({"type": "http", "path": "/invocations", "headers": [], **scope}, None, send))  # pyright: ignore
    return sent


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer 0123456789abcdeg")],
        [(b"authorization", KEY.encode())],
        [(b"authorization", b"Bearer ")],
        [(b"x-authorization", f"Bearer {KEY}".encode())],
    ],
)
@pytest.mark.parametrize("path", ["/invocations", "/v1/models", "/metrics", "/health/", "//health"])
def test_without_the_key_a_request_is_refused(
    monkeypatch: pytest.MonkeyPatch, path: str, headers: list[tuple[bytes, bytes]]
):
    start, body = answers(monkeypatch, path=path, headers=headers)
    assert (start["status"], body["body"]) == (401, b'{"error": "Unauthorized"}')


@pytest.mark.parametrize(
    "scope",
    [
        {"headers": RIGHT},
        {"headers": [(b"authorization", f"bearer {KEY}".encode())]},
        {"path": "/health"},
        {"type": "lifespan"},
        {"type": "websocket", "headers": RIGHT},
    ],
)
def test_requests_with_the_key_and_questions_for_health_are_passed_on(
    monkeypatch: pytest.MonkeyPatch, scope: dict[str, Any]
):
    assert answers(monkeypatch, **scope) == [{"type": "passed"}]


def test_a_websocket_without_the_key_is_closed(monkeypatch: pytest.MonkeyPatch):
    assert answers(monkeypatch, type="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_the_environment_of_vllm_needs_the_standard_library_alone():
    nodes = list(ast.walk(ast.parse(Path(require_key.__file__).read_text())))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    assert {str(module).partition(".")[0] for module in modules} <= sys.stdlib_module_names
