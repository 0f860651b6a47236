"""Starts an engine's server, waits until it answers, and leaves no process of it: neither after an error nor after kill -9."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import httpx2
import psutil

from longhaul.errors import UserError
from longhaul.serving.engines import Server
from longhaul.serving.guard_processes import STOP_S, adopt_orphans, kill_descendants

_POLL_S = 0.25
_KILL_MARGIN_S = 10.0


@contextmanager
def running_server(server: Server, key: str | None, start_timeout_s: float) -> Iterator[psutil.Process]:
    """Start a server, yield its guardian process when the server answers, and stop all its processes at the end.

    It prints where this process prints.

    Raises:
        UserError: the server ends before it answers, or does not answer within the time limit.
    """
    with guarded_process(server.command(), server.environment(key)) as guardian:
        wait_until_healthy(server, guardian, start_timeout_s)
        yield psutil.Process(guardian.pid)


@contextmanager
def guarded_process(
    command: Sequence[str], environment: dict[str, str], stop_s: float = STOP_S
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command below a guardian process, yield the guardian, and stop all processes of the command at the end.

    environment: variables in addition to those of this process
    stop_s:      time that the command gets to stop after SIGTERM
    """
    adopt_orphans()
    before = frozenset(child.pid for child in psutil.Process().children())
    guardian = subprocess.Popen(
        [sys.executable, "-m", "longhaul.serving.guard_processes", str(stop_s), *command],
        stdin=subprocess.PIPE,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        yield guardian
    finally:
        _stop(guardian, stop_s)
        kill_descendants(spared=before)


def wait_until_healthy(server: Server, guardian: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Return when the server answers.

    Raises:
        UserError: it ends before, or does not answer within the time limit.
    """
    engine = server.serving.engine
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if (code := guardian.poll()) is not None:
            raise UserError(
                f"the server of {engine} ended with code {code} before it answered at {server.url}",
                f"what it printed is above; try it alone: {shlex.join(replace(server, key_file=None).command())}",
            )
        if _is_healthy(server):
            return
        time.sleep(_POLL_S)
    raise UserError(
        f"the server of {engine} did not answer at {server.health_url} within {timeout_s:g} s",
        "what it printed is above; increase start_timeout_s if it was still loading",
    )


def _is_healthy(server: Server) -> bool:
    try:
        # A proxy of the centre does not know this address.
        return httpx2.get(server.health_url, timeout=5, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def _stop(guardian: subprocess.Popen[bytes], stop_s: float) -> None:
    """Close the pipe to the guardian, which then stops the server; kill the guardian if it does not end."""
    if guardian.stdin:
        guardian.stdin.close()
    try:
        guardian.wait(stop_s + _KILL_MARGIN_S)
    except subprocess.TimeoutExpired:
        guardian.kill()
        guardian.wait()


def free_port(host: str) -> int:
    """Return a port of an address of this machine that nothing uses now."""
    with socket.socket() as found:
        found.bind((host, 0))
        return found.getsockname()[1]
