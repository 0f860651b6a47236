"""Asks for the API key at every address of vLLM except /health. vLLM imports a copy of this file (option --middleware).

vLLM's own check covers /v1, /v2, /inference and /cohere (vllm/entrypoints/serve/middleware/authenticate.py of vLLM 0.32). Without
this one, everybody in the cluster's network could get answers at /invocations. Only the standard library may be imported here, as
the environment of vLLM has no longhaul.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

Send = Callable[[dict[str, Any]], Awaitable[None]]
OPEN_PATH = "/health"


class RequireKey:
    """Wraps an ASGI application (asgi.readthedocs.io), and passes on requests with the key in VLLM_API_KEY."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._key = os.environ["VLLM_API_KEY"].encode()

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Send) -> None:
        """Answer one connection. `lifespan` is the start and the end of the server."""
        if scope["type"] == "lifespan" or scope["path"] == OPEN_PATH or self._has_key(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _has_key(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        scheme, _, key = dict(headers).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key, self._key)
