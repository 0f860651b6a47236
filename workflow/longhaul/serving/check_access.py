"""Checks who can reach a server: it refuses requests without its API key, and answers at its own address only."""

from __future__ import annotations

import httpx2
import psutil

from longhaul.errors import UserError
from longhaul.serving.engines import Server

_UNAUTHORIZED = 401
_ASKED = "/v1/models"
_PROTECTED = (_ASKED, "/tokenize", "/invocations")
"""vLLM's own check leaves out the last two: see require_key.py."""


def check_keys(server: Server, key: str) -> None:
    """Check that requests without a key and with a wrong key are refused, and that the key is accepted.

    Raises:
        UserError: the server answers one of them in another way.
    """
    wrong = key[:-1] + ("_" if key.endswith("-") else "-")
    for path in _PROTECTED:
        _check_status(server, path, None, "without an API key", _UNAUTHORIZED)
        _check_status(server, path, wrong, "with a wrong API key", _UNAUTHORIZED)
    _check_status(server, _ASKED, key, "with its API key", 200)


def _check_status(server: Server, path: str, key: str | None, kind: str, wanted: int) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    found = httpx2.get(f"{server.url}{path}", headers=headers, timeout=60, trust_env=False).status_code
    if found != wanted:
        raise UserError(
            f"the server of {server.serving.engine} answers a request to {path} {kind} with HTTP status {found} instead of "
            f"{wanted}",
            "do not let others reach this server; use another release of the engine",
        )


def listening_addresses(guardian: psutil.Process) -> list[str]:
    """Return the addresses at which the processes below the guardian accept connections."""
    found = set()
    for process in guardian.children(recursive=True):
        try:
            connections = process.net_connections("inet")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # the starter of a container may belong to root; what runs in the container does not
        found |= {f"{c.laddr.ip}:{c.laddr.port}" for c in connections if c.status == psutil.CONN_LISTEN}
    return sorted(found)


def check_address(server: Server, listens_at: list[str]) -> None:
    """Check that the server's port is open at its own address only.

    Raises:
        UserError: it is open at another address, or another process has it.
    """
    at_port = [address for address in listens_at if address.endswith(f":{server.port}")]
    if not at_port:
        raise UserError(
            f"no process of the server of {server.serving.engine} listens at {server.host}:{server.port}, where something "
            "answers",
            "start again if another process has taken the port; serving.python must start the engine as a process of its own, "
            "not through a daemon such as Docker's",
        )
    if at_port != [f"{server.host}:{server.port}"]:
        raise UserError(
            f"the server of {server.serving.engine} listens at {', '.join(at_port)} instead of "
            f"{server.host}:{server.port} alone",
            "remove options of the site key `serving` that open further addresses",
        )
