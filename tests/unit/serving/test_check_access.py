"""Servers that anybody can ask, or that listen elsewhere, are refused."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from longhaul.config.site_serving_config import Serving
from longhaul.errors import UserError
from longhaul.serving.check_access import check_address, check_keys, listening_addresses
from longhaul.serving.engines import Server

KEY = "0123456789abcdef"


def server(port: int) -> Server:
    return Server(Serving(engine="vllm"), Path("/model"), "m", "bf16", "127.0.0.1", port)


@contextmanager
def answering(accepted: set[str | None], open_path: str = "") -> Iterator[int]:
    """Yield the port of a server that answers 200 to these Authorization headers and at an open path, and 401 to others."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers["Authorization"] in accepted or self.path == open_path
            self.send_response(200 if allowed else 401)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found.server_port
        found.shutdown()


@pytest.mark.parametrize("last", ["f", "-", "_"])
def test_a_server_that_knows_its_key_is_accepted(last: str):
    key = KEY[:-1] + last
    with answering({f"Bearer {key}"}) as port:
        check_keys(server(port), key)


@pytest.mark.parametrize(
    ("accepted", "message"),
    [
        ({f"Bearer {KEY}", None}, "a request to /v1/models without an API key with HTTP status 200 instead of 401"),
        (
            {f"Bearer {KEY}", f"Bearer {KEY[:-1]}-"},
            "a request to /v1/models with a wrong API key with HTTP status 200 instead of 401",
        ),
        (set(), "a request to /v1/models with its API key with HTTP status 401 instead of 200"),
    ],
)
def test_a_server_with_other_answers_is_refused(accepted: set[str | None], message: str):
    with answering(accepted) as port, pytest.raises(UserError, match=message):
        check_keys(server(port), KEY)


def test_an_engine_that_checks_keys_only_below_v1_is_refused():
    """As vLLM does without require_key.py."""
    with answering({f"Bearer {KEY}"}, open_path="/invocations") as port, pytest.raises(UserError, match="/invocations"):
        check_keys(server(port), KEY)


def test_a_process_of_root_below_the_guardian_is_left_out():
    """The starter of a container belongs to root."""

    class Other:
        def net_connections(self, _kind: str) -> list[object]:
            raise psutil.AccessDenied

    class Guardian:
        def children(self, recursive: bool) -> list[Other]:
            return [Other()] if recursive else []

    assert listening_addresses(Guardian()) == []  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_address_of_a_server_is_that_of_its_processes(host: str):
    with socket.socket() as opened:
        opened.bind((host, 0))
        opened.listen()
        port = opened.getsockname()[1]
        own = {f"{c.laddr.ip}:{c.laddr.port}" for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"}
        assert f"{host}:{port}" in own
        assert listening_addresses(psutil.Process()) == []  # this process has no children
        if host == "127.0.0.1":
            check_address(server(port), sorted(own))
        else:
            with pytest.raises(UserError, match=rf"listens at 0\.0\.0\.0:{port} instead of 127\.0\.0\.1:{port} alone"):
                check_address(server(port), sorted(own))


def test_an_answer_of_another_process_is_not_taken_for_that_of_the_server():
    """It took the port after the choice and before the engine."""
    with pytest.raises(UserError, match=r"no process of the server of vllm listens at 127\.0\.0\.1:8000") as error:
        check_address(server(8000), ["127.0.0.1:8001"])
    assert "start again if another process has taken the port" in error.value.hint
    check_address(server(8001), ["127.0.0.1:8001"])
