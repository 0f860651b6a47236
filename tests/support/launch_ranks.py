"""Runs a worker file of a test on several gloo ranks of this machine.

As with torchrun, the first rank that fails ends the others. Imports take longer than the work of most workers. Therefore
multiprocessing's fork server imports torch and longhaul once for a run of the tests. A launcher process is forked from the
server, and the ranks are forked from the launcher.
`python -m tests.support.launch_ranks RANKS WORKER ARGUMENT…` starts ranks without the server, for use behind another command.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]


def run_worker(worker: Path, ranks: int, *arguments: str, timeout_s: float = 180) -> str:
    """Run `main()` of `worker` on `ranks` processes with one thread each; return their stdout. A failure fails the test."""
    done = launch_worker(worker, ranks, *arguments, timeout_s=timeout_s)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def launch_worker(
    worker: Path,
    ranks: int,
    *arguments: str,
    environment: Mapping[str, str] = {},
    timeout_s: float,
) -> subprocess.CompletedProcess[str]:
    """Run `main()` of `worker` on `ranks` processes and wait for them; `environment` is added to that of this process.

    Raises:
        subprocess.TimeoutExpired: after timeout_s; all ranks are killed.
    """
    command = worker_command(worker, ranks, *arguments)
    with tempfile.TemporaryDirectory() as folder:
        output_files = [Path(folder) / name for name in ("stdout", "stderr")]
        variables = rank_environment() | environment
        process = _fork_server().Process(target=_launch, args=(output_files, variables, worker, ranks, arguments))
        process.start()
        try:
            process.join(timeout_s)
            stdout, stderr = (path.read_text() if path.exists() else "" for path in output_files)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(command, timeout_s, stdout, stderr)
        finally:
            if process.is_alive():
                _kill_group(process)
    return subprocess.CompletedProcess(command, process.exitcode, stdout, stderr)


def worker_command(worker: Path, ranks: int, *arguments: str) -> list[str]:
    """Return the command that runs a worker without the fork server."""
    return [sys.executable, "-m", "tests.support.launch_ranks", str(ranks), str(worker), *arguments]


def rank_environment() -> dict[str, str]:
    """Return the environment of ranks. The trainer disables Dynamo too."""
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCHDYNAMO_DISABLE": "1"}
    return {**os.environ, **own}


@cache
def _fork_server() -> ForkServerContext:
    """Start the server; it ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preloaded_rank_imports"])
    paths = os.pathsep.join([str(REPOSITORY), *sys.path])  # before Python 3.13 the server does not inherit sys.path
    with mock.patch.dict(os.environ, {**rank_environment(), "PYTHONPATH": paths}):
        forkserver.ensure_running()
    return context


def _launch(
    output_files: list[Path], environment: dict[str, str], worker: Path, ranks: int, arguments: tuple[str, ...]
) -> None:
    """Run ranks in a session of their own, with stdout and stderr in files. This is the launcher process."""
    os.setsid()
    for descriptor, path in enumerate(output_files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(_run_ranks(worker, ranks, arguments))


def _kill_group(process: BaseProcess) -> None:
    process.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)


def _run_ranks(worker: Path, ranks: int, arguments: tuple[str, ...]) -> int:
    """Run the worker's `before_fork()`, if it has one, and fork the ranks; return 0 or the exit code of the first failure."""
    sys.argv = [str(worker), *arguments]
    names = runpy.run_path(str(worker), run_name="__forked__")
    names.get("before_fork", int)()
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{worker.name} starts {threads - 1} threads before the fork; forked ranks do not have them"
    port = _free_port()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_run_rank, args=(names["main"], rank, ranks, port)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return _wait_for_ranks(processes)


def _run_rank(main: Callable[[], None], rank: int, ranks: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    main()


def _wait_for_ranks(running: list[BaseProcess]) -> int:
    """Wait for all ranks; after a failure, kill the others and return its exit code."""
    while running:
        wait([process.sentinel for process in running])
        if failed := next((process.exitcode for process in running if process.exitcode), None):
            for process in running:
                process.kill()
            return failed if failed > 0 else 1
        running = [process for process in running if process.exitcode is None]
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    import tests.support.preloaded_rank_imports  # noqa: F401  (without the fork server nothing else has imported it)

    sys.exit(_run_ranks(Path(sys.argv[2]), int(sys.argv[1]), tuple(sys.argv[3:])))
