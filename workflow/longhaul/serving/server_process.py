"""Starts an engine's server, waits until it answers, and leaves no process of it: neither after an error nor after kill -9."""

from __future__ import annotations

import os
import shlex
import signal
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
from longhaul.runtime.process_rank import forget_launcher
from longhaul.runtime.process_tree import adopt_orphans, kill_descendants, signal_at_end_of_parent
from longhaul.serving.engines import Server
from longhaul.serving.guard_processes import STOP_S
from longhaul.serving.link_server_nodes import NodeLink, first_node_ended

_POLL_S = 0.25
_KILL_MARGIN_S = 10.0
_OTHER_NODES_S = 30.0
"""Time between the ends of the engine on two nodes of a server that stops."""
_ALLOCATOR = "PYTORCH_ALLOC_CONF"
"""launch.sh sets it for the trainer. vLLM refuses expandable segments in some modes."""
_THREADS = "OMP_NUM_THREADS"
"""All cores of the node. Engines with several processes on a node choose fewer for each."""
_OWN_ADDRESS = ("VLLM_HOST_IP", "SGLANG_HOST_IP")


@contextmanager
def running_server(
    server: Server, key: str | None, start_timeout_s: float, link: NodeLink | None = None
) -> Iterator[psutil.Process]:
    """Start a server, yield its guardian process when the server answers, and stop all its processes at the end.

    It prints where this process prints. With a link, this node is the first one of the server.

    Raises:
        UserError: the server ends before it answers, or does not answer within the time limit.
    """
    with guarded_process(server.command(0, link and link.leader), engine_variables(server, key, link)) as guardian:
        wait_until_healthy(server, guardian, start_timeout_s)
        yield psutil.Process(guardian.pid)


def engine_variables(server: Server, key: str | None, link: NodeLink | None) -> dict[str, str]:
    """Return the variables of the engine on this node, and remove those of the trainer from this process.

    Without its own address, an engine on several nodes may take a public one of the node.
    """
    is_spread = server.shape.tensor * server.shape.pipeline > 1
    forget_launcher()
    for name in (_ALLOCATOR, *([_THREADS] if is_spread else [])):
        os.environ.pop(name, None)
    own = dict.fromkeys(_OWN_ADDRESS, link.own_address) if link else {}
    return own | server.environment(key)


def run_until_first_node_ends(server: Server, link: NodeLink) -> None:
    """Run the engine's part on another node than the first one, until the first one's process ends.

    SIGTERM does not end it: Slurm sends it to all nodes, and the first one may still finish accepted requests with this part.

    Raises:
        RuntimeError: the engine's part ended by itself.
    """
    signal_at_end_of_parent(signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    command, variables = server.command(link.rank, link.leader), engine_variables(server, None, link)
    with guarded_process(command, variables) as guardian:
        while not first_node_ended(link, _POLL_S):
            if guardian.poll() is not None and not first_node_ended(link, _OTHER_NODES_S):
                raise RuntimeError(
                    f"the engine {server.serving.engine} ended with code {guardian.returncode} on {socket.gethostname()}"
                )


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


def require_free_port(host: str, port: int) -> None:
    """Raise UserError if a server cannot listen at this address of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} of {host} cannot be used: {error.strerror}",
                "set serve.port to another port, or leave it out: a free one is taken",
            ) from None
