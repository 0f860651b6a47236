"""Starts a test's own worker file on several gloo ranks of this machine: python ranks.py RANKS WORKER ARGUMENT…

As with torchrun the first rank that fails ends the others. But ranks are forked when all is imported, which takes longer than
what most workers then do: the machine pays for it once and not for every rank.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path


def spawn(worker: Path, ranks: int, *arguments: str, timeout_s: float = 180) -> str:
    """Runs `main()` of `worker` on `ranks` processes with one thread each; returns what they printed."""
    command = command_of(worker, ranks, *arguments)
    environment = {**environment_of_ranks(), "TORCHDYNAMO_DISABLE": "1"}  # as the trainer has it
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def command_of(worker: Path, ranks: int, *arguments: str) -> list[str]:
    return [sys.executable, __file__, str(ranks), str(worker), *arguments]


def environment_of_ranks() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def main() -> int:
    """0, or the exit code of the first rank that failed."""
    from longhaul.cli import _lean_imports

    ranks, worker = int(sys.argv[1]), Path(sys.argv[2])
    sys.argv, sys.path[0] = sys.argv[2:], str(worker.parent)
    with _lean_imports():
        work = runpy.run_path(str(worker), run_name="__forked__")["main"]
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"importing {worker.name} starts {threads - 1} threads, which a fork leaves behind"
    port = _free_port()
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=_work, args=(work, rank, ranks, port)) for rank in range(ranks)]
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
    sys.exit(main())
