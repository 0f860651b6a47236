"""The supervisor of a job without Slurm: restarts in place, recorded causes, signals, and a supervisor that came back late."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from longhaul.artifacts.job_state import (
    CANCELLED,
    ENVIRONMENT,
    TRANSIENT,
    State,
    read_failure,
    read_state,
    utc_now,
)
from longhaul.artifacts.leases import process_start
from longhaul.artifacts.paths import JobId, RunPaths
from longhaul.scheduling import run_job_steps
from tests.support.pipeline_run import REPOSITORY
from tests.support.supervised_job import folder_of, supervise, write_job

FAILS_TWICE = "import pathlib, sys; p = pathlib.Path('starts'); n = len(p.read_text()) if p.exists() else 0; " \
    "p.write_text('x' * (n + 1)); sys.exit(n < 2)"  # fmt: skip
FAILS = "open('starts', 'a').write('x'); raise SystemExit(3)"
STOPS_EARLY = (
    "from pathlib import Path; from longhaul.artifacts.job_state import Outcome; "
    "Outcome('the allocation ends', 5).write(Path({path!r})); open('starts', 'a').write('x')"
)


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "workflow"))  # for steps that import the package


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_crash_is_followed_by_a_restart_in_place(tmp_path: Path):
    spec = write_job(tmp_path, FAILS_TWICE)
    assert supervise(spec) == 0
    assert (tmp_path / "starts").read_text() == "xxx"
    folder = Path(spec.folder)
    state = read_state(folder)
    assert state and state.state == "done" and read_failure(folder) is None
    assert [event["event"] for event in events(folder)] == ["running", "restarted", "restarted", "done"]
    assert {event["allocation"] for event in events(folder)} == {1}


def test_each_attempt_has_a_log_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Also those of a second supervisor; the job's own log names them."""
    says = f"print('attempt', len(__import__('os').listdir({str(tmp_path / 'results/small/logs/train/base')!r}))); "
    spec = write_job(tmp_path, says + FAILS_TWICE)
    supervise(spec)
    logs = RunPaths("small", tmp_path / "results").attempt_logs(JobId("train", ("base",))).logs()
    assert [path.read_text() for path in logs] == ["attempt 1\n", "attempt 2\n", "attempt 3\n"]
    printed = capfd.readouterr().out
    assert all(f": what this attempt prints is in {path}" in printed for path in logs)
    supervise(write_job(tmp_path, "print('fourth')"))
    assert (logs[0].parent / "attempt-0004.log").read_text() == "fourth\n"


def test_flight_recorder_writes_beside_the_log_of_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shows = "print(__import__('os').environ['TORCH_FR_DUMP_TEMP_FILE'])"
    supervise(write_job(tmp_path, shows))
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "/tmp/mine-")
    supervise(write_job(tmp_path, shows))
    logs = RunPaths("small", tmp_path / "results").attempt_logs(JobId("train", ("base",)))
    assert logs.log(1).read_text() == f"{logs.path}/attempt-0001-collectives-rank-\n"
    assert logs.log(2).read_text() == "/tmp/mine-\n"


def test_job_runs_without_a_log_where_none_can_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "results/small").mkdir(parents=True)
    (tmp_path / "results/small/logs").write_text("a file")
    assert supervise(write_job(tmp_path, "print('hello')")) == 0 and "hello" in capfd.readouterr().out


@pytest.mark.parametrize("repair", ["another main process", "a changed input"])
def test_crashes_without_progress_are_final_until_something_changes(
    repair: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    lease = RunPaths("small").lease
    lease.parent.mkdir(parents=True)
    lease.write_text("this main process")
    spec = write_job(tmp_path, FAILS, max_restarts=2)
    assert supervise(spec) == 1
    failure = read_failure(Path(spec.folder))
    assert failure and failure.failure_class == ENVIRONMENT and "3 crashes without a new checkpoint" in failure.cause
    assert failure.remedy == "read the job's log; then run the same command again"
    capfd.readouterr()
    assert supervise(spec) == 1
    printed = capfd.readouterr().out
    assert "would only fail again" in printed and f"longhaul retry {spec.folder}" in printed
    assert (tmp_path / "starts").read_text() == "xxx", "no step was started again"
    (lease if repair == "another main process" else tmp_path / "input").write_text("another text")
    supervise(spec)
    assert (tmp_path / "starts").read_text() == "x" * 6


def test_single_crash_is_transient_if_no_restarts_are_allowed(tmp_path: Path):
    spec = write_job(tmp_path, FAILS, max_restarts=0)
    assert supervise(spec) == 1
    failure = read_failure(Path(spec.folder))
    assert failure and failure.failure_class == TRANSIENT and failure.cause == "Training: exited with code 3"


def test_signal_reaches_the_step_and_cancels_the_job_for_this_invocation_only(tmp_path: Path):
    spec = write_job(tmp_path, f"import os, time; os.kill({os.getpid()}, {signal.SIGTERM:d}); time.sleep(60)")
    (tmp_path / "results/small.lease.json").write_text("this main")
    started = time.monotonic()
    assert supervise(spec) == 1 and time.monotonic() - started < 30
    failure = read_failure(Path(spec.folder))
    assert failure and failure.failure_class == CANCELLED and failure.cause == "stopped by a user or a signal (SIGTERM)"
    assert failure.still_applies(failure.key, "this main") and not failure.still_applies(failure.key, "the next main")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handler is restored"


def test_step_that_ignores_sigterm_is_killed_with_the_processes_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A rank of torchrun is in a session of its own."""
    monkeypatch.setattr(run_job_steps, "STOP_S", 0.2)
    monkeypatch.setattr(run_job_steps, "_LOOK_EVERY_S", 0.05)
    ignore = "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    rank = (
        ignore
        + f"os.kill({os.getpid()}, {signal.SIGTERM:d}); open('rank', 'w').write(str(os.getpid())); time.sleep(600)"
    )
    starts = f"import subprocess; subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True).wait()"
    spec = write_job(tmp_path, ignore + starts)
    assert supervise(spec) == 1
    failure = read_failure(Path(spec.folder))
    assert failure and failure.cause == "stopped by a user or a signal (SIGTERM)"
    assert not psutil.pid_exists(int((tmp_path / "rank").read_text()))


def test_second_signal_sends_no_second_sigterm_to_the_step(tmp_path: Path):
    """torchrun would leave its ranks in the middle of a save."""
    counts = (
        "import os, signal, time; got = []; signal.signal(signal.SIGTERM, lambda *_: got.append(1)); "
        f"[(os.kill({os.getpid()}, number), time.sleep(0.1)) for number in ({signal.SIGINT:d}, {signal.SIGTERM:d})]; "
        "open('got', 'w').write(str(len(got)))"
    )
    assert supervise(write_job(tmp_path, counts)) == 0
    assert (tmp_path / "got").read_text() == "1"


def test_job_ends_with_a_main_process_that_is_killed(tmp_path: Path):
    """SIGKILL: the main process can end nothing itself. The step saves and stops as after SIGTERM."""
    outcome = str(tmp_path / "results/small/stages/base/outcome.json")
    step = (
        "import signal, time; from pathlib import Path; from longhaul.artifacts.job_state import Outcome; "
        f"signal.signal(signal.SIGTERM, lambda *_: (Outcome('stopped by a signal', 5).write(Path({outcome!r})), exit(0))); "
        "Path('begun').touch(); time.sleep(600)"
    )
    spec = write_job(tmp_path, step)
    launch = str(folder_of(spec).launch_spec)
    main = (
        "import subprocess, sys; from longhaul.artifacts.leases import Lease; from longhaul.artifacts.paths import RunPaths; "
        "assert Lease(RunPaths('small').lease).try_acquire(); "
        f"command = [sys.executable, '-m', 'longhaul', 'job', 'supervise', {launch!r}]; "
        "job = subprocess.Popen(command); open('supervisor', 'w').write(str(job.pid)); job.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", main]) as process:
        wait_until((tmp_path / "begun").exists)
        process.kill()
    supervisor = int((tmp_path / "supervisor").read_text())
    wait_until(lambda: process_start(supervisor) is None)
    state = read_state(Path(spec.folder))
    assert state and (state.state, state.reason) == ("waiting", "stopped by a signal")


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_early_stop_leaves_the_job_waiting_for_the_next_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    spec = write_job(tmp_path, STOPS_EARLY.format(path=str(tmp_path / "results/small/stages/base/outcome.json")))
    assert supervise(spec) == 1 and "run the same command again to resume" in capfd.readouterr().out
    state = read_state(Path(spec.folder))
    assert state and (state.state, state.reason) == ("waiting", "the allocation ends")
    assert (tmp_path / "starts").read_text() == "x", "an early stop is no crash"
    supervise(spec)
    state = read_state(Path(spec.folder))
    assert state and state.allocation == 2


def test_allocations_are_counted_from_one_after_a_finished_job(tmp_path: Path):
    spec = write_job(tmp_path, "")
    State("done", None, "n1", ["n1"], 7, utc_now()).write(folder_of(spec).state)
    assert supervise(spec) == 0
    state = read_state(Path(spec.folder))
    assert state and state.allocation == 1


def test_superseded_supervisor_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Its step ends when a later allocation has long finished the job."""
    later = State("done", "41", "n2", ["n2"], 2, utc_now())
    later.write(tmp_path / "later")
    target = str(tmp_path / "results/small/stages/base/state.json")
    code = f"import shutil; shutil.copy({str(tmp_path / 'later')!r}, {target!r}); raise SystemExit(1)"
    spec = write_job(tmp_path, code, max_restarts=0)
    assert supervise(spec) == 1 and "superseded by job 41, allocation 2; exiting" in capfd.readouterr().out
    assert read_state(Path(spec.folder)) == later and read_failure(Path(spec.folder)) is None
