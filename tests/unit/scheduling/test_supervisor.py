"""A supervised job on this machine: restarts, reasons that are kept and told again, and what a submission makes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.job_state import (
    CANCELLED,
    PERMANENT,
    TRANSIENT,
    WALLTIME,
    Failure,
    State,
    invocation,
    launch_key,
    now,
    read_failure,
    read_state,
)
from longhaul.artifacts.quarantine import quarantine, read_quarantine
from longhaul.errors import AllocationTooShort
from longhaul.jobs.launch_files import render_run
from longhaul.jobs.specs import LaunchSpec, LaunchStep
from longhaul.runtime.failure_reports import failure_of
from longhaul.runtime.rank import Rank
from longhaul.scheduling import slurm_client
from longhaul.scheduling.resource_requests import submitted_request
from longhaul.scheduling.slurm_client import JobInfo
from longhaul.scheduling.supervisor import Supervisor
from tests.support.chain import REPOSITORY
from tests.support.small_configs import plan_of

CRASHES_TWICE = "import pathlib, sys; p = pathlib.Path('tries'); n = len(p.read_text()) if p.exists() else 0; " \
    "p.write_text('x' * (n + 1)); sys.exit(n < 2)"  # fmt: skip


def job(folder: Path, code: str, restarts: int = 3) -> LaunchSpec:
    """One step that runs `code` in the job's working folder."""
    made = LaunchSpec(
        run="small",
        name="train-base",
        folder=str(folder / "results/small/stages/base"),
        slurm=False,
        nodes=1,
        requeue=True,
        max_restarts=restarts,
        deadline_poll_interval_s=1.0,
        steps=(LaunchStep(title="Training", command=(sys.executable, "-c", code)),),
        inputs=(str(folder / "input"),),
        data=(str(folder / "corpus"),),
        checkpoints=None,
        quarantine="results/quarantine.json",
    )
    made.write(Path(made.folder) / "launch.json")
    return made


def command(made: LaunchSpec) -> list[str]:
    return [sys.executable, "-m", "longhaul", "supervise", f"{made.folder}/launch.json"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY / "workflow")}


def supervise(folder: Path, made: LaunchSpec) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(made), cwd=folder, capture_output=True, text=True, check=False, timeout=60, env=environment()
    )


def test_a_crash_is_followed_by_a_restart_in_place(tmp_path: Path):
    made = job(tmp_path, CRASHES_TWICE)
    done = supervise(tmp_path, made)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "tries").read_text() == "xxx"
    state = read_state(Path(made.folder))
    assert state and state.state == "done" and read_failure(Path(made.folder)) is None
    events = [json.loads(line)["event"] for line in (Path(made.folder) / "history.jsonl").open()]
    assert events == ["running", "restarted", "restarted", "done"]


def test_crashes_without_progress_end_it_and_the_reason_is_told_again(tmp_path: Path):
    made = job(tmp_path, "open('tries', 'a').write('x'); raise SystemExit(3)", restarts=2)
    assert supervise(tmp_path, made).returncode == 1
    failure = read_failure(Path(made.folder))
    assert failure and failure.failure_class == PERMANENT and "3 crashes without a new checkpoint" in failure.cause
    assert "longhaul retry" in failure.remedy
    again = supervise(tmp_path, made)
    assert again.returncode == 1 and "would only fail again" in again.stdout
    assert (tmp_path / "tries").read_text() == "xxx", "nothing was started again"
    (tmp_path / "input").write_text("mended")
    supervise(tmp_path, made)
    assert (tmp_path / "tries").read_text() == "x" * 6, "another input is another try"


def test_retry_forgets_the_reason(tmp_path: Path):
    made = job(tmp_path, CRASHES_TWICE, restarts=0)
    assert supervise(tmp_path, made).returncode == 1
    words = [sys.executable, "-m", "longhaul", "retry", made.folder]
    assert subprocess.run(words, check=False, env=environment(), capture_output=True).returncode == 0
    assert subprocess.run(words, check=False, env=environment(), capture_output=True).returncode == 2


def test_a_signal_reaches_the_step_and_ends_the_job_for_this_invocation(tmp_path: Path):
    made = job(tmp_path, "open('started', 'w').close(); import time; time.sleep(60)")
    lease = tmp_path / "results/small.lease.json"
    lease.write_text("this main")
    process = subprocess.Popen(command(made), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 1
    failure = read_failure(Path(made.folder))
    assert failure and failure.failure_class == CANCELLED
    assert failure.is_current(failure.key, "this main") and not failure.is_current(failure.key, "the next main")


def test_a_full_disk_is_over_when_there_is_space(tmp_path: Path):
    def failure(needs_bytes: int) -> Failure:
        return Failure(PERMANENT, "disk full", "", key="k", needs_path=str(tmp_path), needs_bytes=needs_bytes)

    assert failure(2**62).is_current("k", "") and not failure(1).is_current("k", "")


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OSError(28, "No space left on device", "/somewhere/file"), PERMANENT, "disk full"),
        (MemoryError(), PERMANENT, "out of memory"),
        (RuntimeError("connection reset by peer"), "transient", "connection reset"),
    ],
)
def test_what_would_happen_again_is_permanent(error: Exception, kind: str, says: str):
    failure = failure_of(error, Rank(3, 4, 1, 2, "n2"))
    assert failure.failure_class == kind and says in failure.cause
    assert (failure.rank, failure.host) == (3, "n2")


def test_a_submission_leaves_out_quarantined_nodes_and_waits_for_the_job_that_runs(tmp_path: Path):
    plan, folder = planned(tmp_path)
    assert submitted_request(plan, "train-base", tmp_path).exclude == ()
    quarantine(tmp_path / "results/quarantine.json", ["n7", "n7", "; rm"], "down", "job 5")
    assert read_quarantine(tmp_path / "results/quarantine.json").names == ("n7", "; rm")
    State("running", "41", "n1", ["n1"], 1, now()).write(folder / "state.json")
    request = submitted_request(plan, "train-base", tmp_path)
    assert request.exclude == ("n7",) and request.after_job == "41"
    extra = str(request.as_resources()["slurm_extra"])
    assert "--exclude=n7" in extra and "--dependency=afterany:41" in extra
    State("done", "41", "n1", ["n1"], 1, now()).write(folder / "state.json")
    assert submitted_request(plan, "train-base", tmp_path).after_job is None


def test_a_job_that_would_only_fail_again_asks_for_a_minute(tmp_path: Path):
    plan, folder = planned(tmp_path)
    key = launch_key(LaunchSpec.read(folder / "launch.json").inputs, [])
    Failure(PERMANENT, "NaN", "", key=key).write(folder / "failure.json")
    request = submitted_request(plan, "train-base", tmp_path)
    assert (request.nodes, request.tasks, request.minutes, request.gpus_per_node) == (1, 1, 1, 0)
    (folder / "ds_config.json").write_text("{}")
    assert submitted_request(plan, "train-base", tmp_path).minutes > 1


def test_the_invocation_is_the_main_that_holds_the_lease(tmp_path: Path):
    assert invocation(tmp_path, "small") == ""
    (tmp_path / "small.lease.json").write_text("holder")
    assert invocation(tmp_path, "small") == "holder"


def ended_by_the_limit(made: LaunchSpec) -> str:
    """The class of the failure of an allocation that ended before a save."""
    supervisor, state = Supervisor(made), read_state(Path(made.folder))
    supervisor.leg = state.leg if state else 1
    with pytest.raises(SystemExit):
        supervisor._fail_at_the_limit(Failure(TRANSIENT, "ended with 143", ""))
    failure = read_failure(Path(made.folder))
    assert failure and "before a save" in failure.cause
    return failure.failure_class


def test_two_allocations_in_a_row_without_a_save_are_enough(tmp_path: Path):
    made = job(tmp_path, "")
    assert [ended_by_the_limit(made), ended_by_the_limit(made)] == [WALLTIME, PERMANENT]


def test_an_allocation_that_went_well_in_between_begins_the_count_anew(tmp_path: Path):
    outcome = str(tmp_path / "results/small/stages/base/outcome.json")
    leave = "from pathlib import Path; from longhaul.artifacts.job_state import Outcome; Outcome('the allocation ends', 5).write"
    made = job(tmp_path, f"{leave}(Path({outcome!r}))")
    assert ended_by_the_limit(made) == WALLTIME
    assert "the next run goes on" in supervise(tmp_path, made).stdout
    assert ended_by_the_limit(made) == WALLTIME


def planned(folder: Path) -> tuple[Any, Path]:
    """A plan whose files are rendered, and its first stage's folder."""
    (folder / "prose.jsonl").write_text('{"text": "a"}\n')
    (folder / "chats.jsonl").write_text('{"messages": []}\n')
    datasets = {
        name: {"kind": kind, "files": [f"{name}.jsonl"]} for name, kind in (("prose", "text"), ("chats", "chat"))
    }
    plan = plan_of(folder, {"datasets": datasets})
    render_run(plan, folder)
    return plan, folder / "results/small/stages/base"


def test_a_supervisor_that_was_cut_off_writes_over_nothing(tmp_path: Path):
    """Its step ends when another leg has long finished."""
    folder = tmp_path / "results/small/stages/base"
    later = State("done", "41", "n2", ["n2"], 2, now())
    code = (
        f"import shutil; shutil.copy({str(tmp_path / 'later')!r}, {str(folder / 'state.json')!r}); raise SystemExit(1)"
    )
    later.write(tmp_path / "later")
    made = job(tmp_path, code, restarts=0)
    done = supervise(tmp_path, made)
    assert done.returncode == 1 and "has no more to say" in done.stdout
    assert read_state(folder) == later and read_failure(folder) is None


def short_of_time() -> Failure:
    """What the trainer says when a restart comes too late in an allocation."""
    error = AllocationTooShort("the allocation ends in 1 s: nothing could be saved", "give the stage more minutes")
    return failure_of(error, Rank(0, 2, 0, 2, "n1"))


def test_an_allocation_that_ends_while_a_stage_starts_is_not_the_last_one(tmp_path: Path, monkeypatch):
    made = job(tmp_path, "").model_copy(update={"slurm": True})
    monkeypatch.setattr(Supervisor, "_info", lambda self: JobInfo("RUNNING", 1, "n1", None, False))
    classes = []
    for _ in range(2):
        supervisor = Supervisor(made)
        with pytest.raises(SystemExit):
            supervisor._end_if_over(short_of_time())
        failure = read_failure(Path(made.folder))
        assert failure and "the allocation ends in 1 s" in failure.cause and failure.remedy
        classes.append(failure.failure_class)
    assert classes == [WALLTIME, PERMANENT], "the second one in a row in which nothing is saved says that none will do"


def test_an_allocation_in_which_something_was_saved_is_followed_by_the_next(tmp_path: Path, monkeypatch):
    made = job(tmp_path, "").model_copy(update={"slurm": True, "checkpoints": "weights"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Supervisor, "_info", lambda self: JobInfo("RUNNING", 1, "n1", None, False))
    monkeypatch.setattr(slurm_client, "requeue", lambda job_id, excluded: "")
    supervisor = Supervisor(made)
    saved = tmp_path / "weights/abc/checkpoints/step-00000005"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text("{}")
    supervisor.ended_by = signal.SIGTERM  # Slurm's, by which it takes the requeued job's processes away
    monkeypatch.setattr(Supervisor, "_end_if_told", lambda self, failure: None)
    with pytest.raises(SystemExit):
        supervisor._end_if_over(short_of_time())
    state = read_state(Path(made.folder))
    assert state and (state.state, state.reason) == ("waiting", "the allocation ends")
    assert read_failure(Path(made.folder)) is None
