"""Starts a test's own worker file on several gloo ranks of this machine.

As with torchrun the first rank that fails ends the others. But imports take longer than what most workers then do. A server of
multiprocessing's imports them once in a run of the tests; what starts the ranks is forked from it, and each rank from that.
`python ranks.py RANKS WORKER ARGUMENT…` starts them without the server, where another command must stand in front.
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


def spawn(worker: Path, ranks: int, *arguments: str, timeout_s: float = 180) -> str:
    """Runs `main()` of `worker` on `ranks` processes with one thread each; returns what they printed."""
    done = launch(worker, ranks, *arguments, timeout_s=timeout_s)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def launch(
    worker: Path,
    ranks: int,
    *arguments: str,
    environment: Mapping[str, str] = {},
    timeout_s: float,
) -> subprocess.CompletedProcess[str]:
    """Runs them to their end; `environment` is added to that of this process. TimeoutExpired: all of them are ended."""
    command = command_of(worker, ranks, *arguments)
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder) / name for name in ("stdout", "stderr")]
        own = environment_of_ranks() | environment
        process = _server().Process(target=_run_apart, args=(printed, own, worker, ranks, arguments))
        process.start()
        try:
            process.join(timeout_s)
            stdout, stderr = (path.read_text() if path.exists() else "" for path in printed)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(command, timeout_s, stdout, stderr)
        finally:
            if process.is_alive():
                _end(process)
    return subprocess.CompletedProcess(command, process.exitcode, stdout, stderr)


def command_of(worker: Path, ranks: int, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.support.ranks", str(ranks), str(worker), *arguments]


def environment_of_ranks() -> dict[str, str]:
    # Dynamo: as the trainer has it.
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCHDYNAMO_DISABLE": "1"}
    return {**os.environ, **own}


@cache
def _server() -> ForkServerContext:
    """It ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.rank_imports"])
    paths = os.pathsep.join([str(REPOSITORY), *sys.path])  # before Python 3.13 a server is not told of sys.path
    with mock.patch.dict(os.environ, {**environment_of_ranks(), "PYTHONPATH": paths}):
        forkserver.ensure_running()
    return context


def _run_apart(
    printed: list[Path], environment: dict[str, str], worker: Path, ranks: int, arguments: tuple[str, ...]
) -> None:
    os.setsid()
    for number, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(_run(worker, ranks, arguments))


def _end(process: BaseProcess) -> None:
    process.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)


def _run(worker: Path, ranks: int, arguments: tuple[str, ...]) -> int:
    """0, or the exit code of the first rank that failed. A worker's `before_fork()` is run once for all ranks."""
    sys.argv = [str(worker), *arguments]
    names = runpy.run_path(str(worker), run_name="__forked__")
    names.get("before_fork", int)()
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{worker.name} starts {threads - 1} threads before the fork, which leaves them behind"
    port = _free_port()
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=_work, args=(names["main"], rank, ranks, port)) for rank in range(ranks)]
    for process in started:
        process.start()
    return _first_failure(started)


def _work(work: Callable[[], None], rank: int, ranks: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    work()


def _first_failure(running: list[BaseProcess]) -> int:
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
    sys.exit(_run(Path(sys.argv[2]), int(sys.argv[1]), tuple(sys.argv[3:])))
