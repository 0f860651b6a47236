"""A signal to the main process of a local run alone, as `kill` and `timeout` send it: its jobs save and end, and then it ends."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from longhaul.artifacts.job_state import read_failure, read_state
from longhaul.artifacts.leases import process_start
from tests.faults.doctor_answers import assert_doctor_names
from tests.support.pipeline_run import PipelineRun, local_site, tiny_config, write_site

TOKENIZER = "results/tiny/tokenizer.json"
_RANK = """
import os, signal, sys, time
def save(*_):
    open("saved", "a").write("x")
    sys.exit("hangs" in sys.argv and time.sleep(600))
signal.signal(signal.SIGTERM, save)
open("rank.new", "w").write(str(os.getpid()))
os.rename("rank.new", "rank")
time.sleep(600)
"""
_LIKE_TORCHRUN = """
import signal, subprocess, sys
rank = subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)
signal.signal(signal.SIGTERM, lambda number, _: rank.send_signal(number))
sys.exit(rank.wait() or 1)
"""


class LongJob(PipelineRun):
    """A run whose tokenizer job only waits, in a process with a session of its own, until it gets SIGTERM."""

    def __init__(self, folder: Path, hangs: bool = False) -> None:
        super().__init__(folder, tiny_config())
        environment = {"kind": "venv", "path": str(folder / "venv")}
        write_site(folder, {**local_site(), "software": environment})
        python, parent, rank = folder / "venv/bin/python", folder / "parent.py", folder / "rank.py"
        parent.write_text(_LIKE_TORCHRUN)
        rank.write_text(_RANK)
        python.parent.mkdir(parents=True)
        words = shlex.join([sys.executable, str(parent), str(rank), *(["hangs"] if hangs else [])])
        job = f'case "$*" in *"job run tokenizer"*) exec {words};; esac'
        python.write_text(f'#!/bin/sh\n{job}\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[str]]:
        """Yield the main process while the job runs."""
        words = ["env", "--default-signal=INT,HUP", *self.command(TOKENIZER)]
        with subprocess.Popen(
            words, cwd=self.folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=self.environment()
        ) as main:
            try:
                wait_until((self.folder / "rank").exists, main)
                yield main
            finally:
                main.kill()

    @property
    def rank(self) -> int:
        return int((self.folder / "rank").read_text())

    @property
    def saves(self) -> str:
        return (self.folder / "saved").read_text()

    def processes(self) -> list[psutil.Process]:
        """Return the processes of the run's jobs."""
        running = psutil.process_iter(["cmdline", "status"])
        found = [p for p in running if str(self.folder) in " ".join(p.info["cmdline"] or [])]
        return [p for p in found if p.info["status"] != psutil.STATUS_ZOMBIE]


def wait_until(condition: Callable[[], bool], main: subprocess.Popen[str] | None = None, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert main is None or main.poll() is None, main.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_jobs_save_and_end_before_the_main_process(tmp_path: Path, number: signal.Signals) -> None:
    run = LongJob(tmp_path / "run")
    with run.started() as main:
        main.send_signal(number)
        printed = main.communicate(timeout=60)[1]
    assert main.returncode == 128 + number, printed
    assert run.saves == "x" and not run.processes(), "each job was asked once, and has ended"
    assert printed.count("the running jobs end, trainings save first (5 min at most") == 1, printed
    assert "Traceback" not in printed
    assert not (run.folder / "results/tiny.lease.json").exists()
    failure = read_failure(run.results / "jobs/tokenizer")
    assert failure and failure.cause == "stopped by a user or a signal (SIGTERM)"
    if number != signal.SIGHUP:  # a closed terminal is no fault of the matrix
        assert_doctor_names(f"{number.name} of the main snakemake", run.results, "tokenizer")


def test_more_signals_kill_a_job_that_does_not_end(tmp_path: Path) -> None:
    run = LongJob(tmp_path / "run", hangs=True)
    with run.started() as main:
        while process_start(run.rank):  # signals within 2 s count as one
            main.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        main.communicate(timeout=60)
    assert main.returncode == 128 + signal.SIGTERM and not run.processes()


def test_jobs_of_a_killed_main_process_save_and_end(tmp_path: Path) -> None:
    run = LongJob(tmp_path / "run")
    with run.started() as main:
        main.kill()
    wait_until(lambda: process_start(run.rank) is None)
    wait_until(lambda: not run.processes())
    assert run.saves == "x"
    state = read_state(run.results / "jobs/tokenizer")
    assert state and state.reason == "cancelled: the main process of the run was killed"
    assert json.loads((run.folder / "results/tiny.lease.json").read_text())["pid"], "the next run takes it over"
    assert_doctor_names("kill -9 of the main snakemake", run.results, "tokenizer")
