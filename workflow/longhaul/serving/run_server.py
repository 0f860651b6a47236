"""Runs one node of a serving job: starts the engine, says where it answers, drains it before the allocation ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from subprocess import TimeoutExpired
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from longhaul.artifacts.compare_hashes import read_export
from longhaul.artifacts.endpoint import Endpoint
from longhaul.artifacts.job_state import SIGNALLED, Outcome, read_deadline
from longhaul.artifacts.leases import LeaseOwner
from longhaul.artifacts.paths import JobFolder
from longhaul.config.site_serving_config import Serving
from longhaul.jobs.kinds.serve_job import ServeSpec
from longhaul.runtime.process_tree import signal_at_end_of_parent
from longhaul.serving.api_key import read_key_file
from longhaul.serving.check_access import check_address, check_keys, listening_addresses
from longhaul.serving.engines import LOOPBACK, Server, ServerShape
from longhaul.serving.link_server_nodes import NodeLink, listening_address, node_link
from longhaul.serving.server_process import (
    engine_variables,
    free_port,
    guarded_process,
    require_free_port,
    run_until_first_node_ends,
    wait_until_healthy,
)

if TYPE_CHECKING:
    from subprocess import Popen

_POLL_S = 0.5
_END_OF_GUARDIAN_S = 2.0
_STOP_MARGIN_S = 30.0
"""Time before the end of an allocation in which the job requeues itself, after the requests have ended."""


def run(job: ServeSpec) -> None:
    """Serve until the allocation ends, a signal comes, or the engine ends.

    Raises:
        UserError: the export is damaged, the engine does not start or listens at another address than planned, or the node has
            not the address of its name, or a public one.
        RuntimeError: the engine ended unexpectedly.
    """
    signal_at_end_of_parent(signal.SIGTERM)
    with node_link(job.nodes) as link:
        model = Path(read_export(Path(job.export)).path).absolute()
        if link is None or link.rank == 0:
            _serve(job, model, link)
        else:
            # vLLM serves nothing here. SGLang answers only whether it lives.
            server = server_of(job, model, link.own_address, free_port(link.own_address))
            run_until_first_node_ends(server, link)


def server_of(job: ServeSpec, model: Path, host: str, port: int) -> Server:
    """Return the server of a job's export that listens on this address."""
    shape = ServerShape(
        nodes=job.nodes,
        tensor=job.tensor,
        pipeline=job.pipeline,
        expert_parallel=job.expert_parallel,
        context_tokens=job.context,
        max_running_requests=job.max_running_requests,
    )
    key_file = Path(job.key_file).absolute() if job.key_file else None
    return Server(job.serving, model, job.model_name, job.dtype, host, port, shape, key_file, job.drain_s)


def _serve(job: ServeSpec, model: Path, link: NodeLink | None) -> None:
    """Serve on the first node."""
    host = _listening_address(job)
    server = server_of(job, model, host, job.port or free_port(host))
    key = read_key_file(server.key_file) if server.key_file else None
    require_free_port(host, server.port)
    server.place_files()
    command, variables = server.command(0, link and link.leader), engine_variables(server, key, link)
    engine = guarded_process(command, variables, job.drain_s)
    with _StopSignals() as signals, _endpoint(job, server) as endpoint, engine as guardian:
        signals.interrupt(lambda: _wait_until_ready(server, guardian, job.start_timeout_s, key))
        if not signals.received:
            endpoint.announce()
        reason = _wait_for_end(job, guardian, signals)
        endpoint.withdraw()
    Outcome(reason, 0).write(JobFolder(Path(job.folder)).outcome)
    print(f"stopped the server: {reason}", flush=True)


def _wait_until_ready(server: Server, guardian: Popen[bytes], timeout_s: float, key: str | None) -> None:
    """Return when the server answers, at its own address only and only with its key.

    Raises:
        UserError: it does not answer in time, it listens at another address, or it answers without the key.
        RuntimeError: it ended after its first answer.
    """
    wait_until_healthy(server, guardian, timeout_s)
    try:
        check_address(server, listening_addresses(psutil.Process(guardian.pid)))
        if key:
            check_keys(server, key)
    except Exception as error:
        # The guardian ends a moment after the engine. An engine that has ended listens nowhere and answers nothing.
        with suppress(TimeoutExpired):
            raise _engine_ended(server.serving, guardian.wait(_END_OF_GUARDIAN_S)) from error
        raise


def _wait_for_end(job: ServeSpec, guardian: Popen[bytes], signals: _StopSignals) -> str:
    """Return why the server must stop.

    Raises:
        RuntimeError: the engine ended unexpectedly.
    """
    while True:
        if signals.received:
            return SIGNALLED
        if guardian.poll() is not None:
            raise _engine_ended(job.serving, guardian.returncode)
        if reason := _end_of_allocation(job):
            return reason
        time.sleep(_POLL_S)


def _engine_ended(serving: Serving, code: int) -> RuntimeError:
    return RuntimeError(f"the engine {serving.engine} ended with code {code}")


def _end_of_allocation(job: ServeSpec) -> str:
    deadline = read_deadline(Path(job.folder))
    if deadline and deadline.preempted:
        return "preempted"
    end_s = deadline.end_s if deadline else None
    return "the allocation ends" if end_s and time.time() + job.drain_s + _STOP_MARGIN_S >= end_s else ""


class _Interrupted(Exception):
    """A signal came while a function ran that must not be waited for."""


class _StopSignals:
    """Remembers SIGTERM and SIGINT during a `with` block."""

    def __init__(self) -> None:
        self.received = False
        self._interrupts = False

    def interrupt(self, function: Callable[[], None]) -> None:
        """Call a function, and return at once when a signal comes."""
        self._interrupts = True
        try:
            if not self.received:
                function()
        except _Interrupted:
            return
        finally:
            self._interrupts = False

    def __enter__(self) -> _StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.received = True
        if self._interrupts:
            raise _Interrupted


class _EndpointFile:
    """Writes endpoint.json: first that the server starts, then that it answers."""

    def __init__(self, job: ServeSpec, server: Server) -> None:
        self._path = JobFolder(Path(job.folder)).endpoint
        self._endpoint = Endpoint(
            url=f"{server.url}/v1",
            model=server.requested_model,
            engine=job.serving.engine,
            key_file=str(server.key_file) if server.key_file else None,
            ready=False,
            owner=LeaseOwner.this_process(),
        )
        self._endpoint.write(self._path)

    def announce(self) -> None:
        replace(self._endpoint, ready=True).write(self._path)
        print(f"serves {self._endpoint.model} at {self._endpoint.place}", flush=True)

    def withdraw(self) -> None:
        self._path.unlink(missing_ok=True)


@contextmanager
def _endpoint(job: ServeSpec, server: Server) -> Iterator[_EndpointFile]:
    file = _EndpointFile(job, server)
    try:
        yield file
    finally:
        file.withdraw()


def _listening_address(job: ServeSpec) -> str:
    """Return where the server listens: on this machine alone without Slurm or without a key, else in the cluster's network."""
    if job.local or job.key_file is None:
        return LOOPBACK
    return listening_address(job.nodes)
