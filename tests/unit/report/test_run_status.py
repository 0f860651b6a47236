"""The status of a run is read from the files of its jobs."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from longhaul.artifacts import shared_file_system
from longhaul.artifacts.artifact_schemas import Checkpoint, Export, SavedCheckpoint
from longhaul.artifacts.endpoint import Endpoint
from longhaul.artifacts.job_state import CANCELLED, Failure, JobsToRun, StateName
from longhaul.artifacts.leases import LeaseOwner
from longhaul.artifacts.line_records import append_record
from longhaul.artifacts.paths import JobFolder, JobId, RunPaths
from longhaul.errors import UserError
from longhaul.report import run_status
from longhaul.report.run_status import (
    DONE,
    FAILED,
    INTERRUPTED,
    NOT_STARTED,
    QUEUED,
    RUNNING,
    STARTS_AGAIN,
    UNKNOWN,
    RunStatus,
    read_status,
)
from longhaul.report.slurm_queue_types import Queue, QueuedJob
from longhaul.report.status_text import status_view, summary_lines
from tests.support.run_folder import TRAIN, RunFolder

SHA = "ab" * 32


def shown(view: RenderableType) -> str:
    stream = StringIO()
    Console(file=stream, width=160).print(view)
    return stream.getvalue()


def job_state(status: RunStatus, job: JobId = TRAIN) -> tuple[str, str]:
    return next((found.state, found.detail) for found in status.jobs if found.name == str(job))


def test_stage_with_more_steps_than_its_config_has_no_time_left(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.train(120)
    (stage,) = run.status().stages
    assert stage.progress and (stage.progress.step, stage.progress.seconds_left) == (120, 0.0)
    assert run.status().training_left_s == (0.0, 0.0)


def test_run_without_a_plan_is_refused_until_one_is_named_that_has_started(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds no plan.json.*\s+remedy: start it with .*, or name another run's folder"
    ):
        read_status(RunPaths("none", tmp_path))
    assert read_status(RunFolder(tmp_path).paths)  # Snakemake writes plan.json before the first job


def test_plan_of_another_release_is_refused_until_the_run_writes_it_again(tmp_path: Path) -> None:
    paths = RunFolder(tmp_path).paths
    written = paths.plan.read_text()
    paths.plan.write_text("{}")
    with pytest.raises(
        UserError, match=r"remedy: another release .*, or run the same command again, which writes the file"
    ):
        read_status(paths)
    paths.plan.write_text(written)
    assert read_status(paths)


def test_progress_of_a_running_stage(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.state(TRAIN, "running")
    run.train(40)
    status = run.status(train_base=QueuedJob("7", "RUNNING", "None", "N/A"))
    progress = status.stages[0].progress
    assert job_state(status) == (RUNNING, "on n1, n2") and status.state == RUNNING
    assert progress is not None and (progress.step, progress.first_loss) == (40, 4.99)
    assert progress.loss == pytest.approx(4.645)  # the mean of steps 31 to 40
    assert (progress.first_validation_loss, progress.validation_loss) == (5.5, 4.5)
    assert progress.seconds_left == pytest.approx(60 * 2.5)
    assert (progress.tokens_per_s, progress.mfu, progress.attempts) == (1000.0, 0.4, 1)
    assert (progress.last_saved_step, progress.last_saved_s, progress.checkpoint_bytes) == (30, 1000.0, 1000)


def test_time_left_covers_stages_that_have_not_begun(tmp_path: Path) -> None:
    """The second stage has twice the FLOPs of the first one, whose steps take 2.5 s."""
    run = RunFolder(tmp_path, stages=2)
    plan = json.loads(run.paths.plan.read_text())
    for row, flops in zip(plan["stages"], (1e15, 2e15), strict=True):
        row["flops"] = flops
    run.paths.plan.write_text(json.dumps(plan))
    assert run.status().training_left_s == pytest.approx((2 * 7.5 * 3600 / 8, 2 * 9 * 3600 / 8)), "as planned"
    run.train(40)
    assert run.status().training_left_s == pytest.approx((60 * 2.5 + 200 * 2.5,) * 2)
    run.state(TRAIN, "done")
    assert run.status().training_left_s == pytest.approx((200 * 2.5,) * 2)


def test_steps_of_a_length_in_epochs_are_those_of_the_plan_until_the_job_counts_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    plan = json.loads(run.paths.plan.read_text())
    plan["stages"][0].update(steps=None, estimated_steps=90)
    run.paths.plan.write_text(json.dumps(plan))
    (stage,) = run.status().stages
    assert (stage.steps, stage.estimated_steps) == (None, 90)
    run.weights().identity.write_text(json.dumps({"steps": 88}))
    assert run.status().stages[0].steps == 88


def test_plan_of_another_release_is_refused_with_a_remedy(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    plan = json.loads(run.paths.plan.read_text())
    del plan["scheduler"]
    for damaged in (json.dumps(plan), run.paths.plan.read_text()[:100]):
        run.paths.plan.write_text(damaged)
        with pytest.raises(UserError, match=r"plan\.json: (`scheduler` is missing|no valid JSON)") as caught:
            run.status()
        assert "another release of longhaul wrote it, or its writer was stopped" in caught.value.hint


@pytest.mark.parametrize("target", ["scratch/purged/base", "scratch/base"])
def test_stage_folder_that_links_to_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """A user moved the folder to scratch, which was purged."""
    monkeypatch.setattr(shared_file_system.time, "sleep", lambda seconds: pytest.fail("it waits"))
    run = RunFolder(tmp_path, scheduler="local")
    stage = run.paths.stage("base").path
    stage.parent.mkdir(parents=True)
    (stage.parent / "scratch").mkdir()
    stage.symlink_to(target)
    assert job_state(run.status()) == (NOT_STARTED, "")


def test_event_at_no_possible_date_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path)
    saved = {"event": "saved", "step": 40, "training_s": 1.0, "validation_s": 0.0, "saving_s": 0.0}
    append_record(run.train(40).events, {**saved, "time_s": 1e308})
    assert "last save at step 30" in shown(status_view(run.status()))
    assert "line 2: `time_s` is 1e+308" in capsys.readouterr().err


@pytest.mark.parametrize("record", ["state", "failure"])
@pytest.mark.parametrize("how", ["half-written", "another release"])
def test_record_that_cannot_be_read_is_named(tmp_path: Path, record: str, how: str) -> None:
    """It differs from a job that has not started."""
    run = RunFolder(tmp_path)
    run.state(TRAIN, "running")
    Failure("permanent", "out of memory", "").write(run.paths.job(TRAIN).failure)
    if record == "state":
        run.paths.job(TRAIN).failure.unlink()
    path = getattr(run.paths.job(TRAIN), record)
    text = path.read_text()
    path.write_text(text[:40] if how == "half-written" else re.sub(r'("schema_version": )\d', r"\g<1>9", text))
    status = run.status()
    state, detail = job_state(status)
    assert state == UNKNOWN == status.state and str(path) in detail
    assert "not valid JSON" in detail if how == "half-written" else "version 9, not" in detail


def test_half_written_metrics_are_left_out(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    weights = run.train(40)
    with weights.metrics.open("a") as stream:
        stream.write('{"step": 41, "lo')
    progress = run.status().stages[0].progress
    assert progress is not None and progress.step == 40


def test_job_waits_for_the_reason_that_slurm_gives(tmp_path: Path) -> None:
    """Also a failed job that waits for its next try is queued."""
    run = RunFolder(tmp_path)
    Failure("node", "node n1 is down", "").write(run.paths.job(TRAIN).failure)
    pending = QueuedJob("8", "PENDING", "Resources", "2026-11-28T18:00:00")
    status = run.status(train_base=pending)
    assert job_state(status) == (QUEUED, "waits: Resources, expected start 2026-11-28T18:00:00")
    assert job_state(run.status(train_base=QueuedJob("8", "PENDING", "Priority", "N/A"))) == (QUEUED, "waits: Priority")
    assert status.state == QUEUED and status.jobs[1].slurm_job_id == "8"


def test_failed_job_has_cause_and_remedy(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    Failure("permanent", "out of memory", "use a smaller micro batch", job_id="7").write(run.paths.job(TRAIN).failure)
    status = run.status()
    assert job_state(status) == (FAILED, "out of memory") and status.jobs[1].remedy == "use a smaller micro batch"
    assert status.state == FAILED


def test_failed_job_starts_again_only_while_a_main_process_works_on_the_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    run.main_process()
    of_this = Failure("node", "node n1 is down", "call the centre", invocation=run.paths.lease.read_text())
    states: list[tuple[str, str]] = []
    JobsToRun(of_this.invocation, {str(TRAIN): ""}).write(run.paths.jobs_to_run)
    for failure in (replace(of_this, next_attempt="attempt 2 of 3"), replace(of_this, invocation="earlier"), of_this):
        failure.write(run.paths.job(TRAIN).failure)
        states.append(job_state(run.status()))
    assert states == [
        (STARTS_AGAIN, "attempt 2 of 3: node n1 is down"),
        (STARTS_AGAIN, "node n1 is down"),
        (FAILED, "node n1 is down"),
    ]
    replace(of_this, next_attempt="attempt 2 of 3").write(run.paths.job(TRAIN).failure)
    run.paths.lease.unlink()
    assert job_state(run.status()) == (FAILED, "node n1 is down") and run.status().state == FAILED


@pytest.mark.parametrize(
    "to_run",
    [
        pytest.param({"environment": ""}, id="a run up to a target that does not need the job"),
        pytest.param(None, id="a run that has not compared the failure with its inputs yet, and may refuse it"),
    ],
)
def test_failure_that_this_run_may_not_repeat_stays_a_failure(tmp_path: Path, to_run: dict[str, str] | None) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    run.main_process()
    JobsToRun("earlier", {str(TRAIN): ""}).write(run.paths.jobs_to_run)
    if to_run is not None:
        JobsToRun(run.paths.lease.read_text(), to_run).write(run.paths.jobs_to_run)
    Failure("permanent", "out of memory", "less", invocation="earlier").write(run.paths.job(TRAIN).failure)
    status = run.status()
    assert job_state(status) == (FAILED, "out of memory") and status.jobs[1].remedy == "less"


def test_job_that_left_the_queue_without_a_record_is_interrupted(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.state(TRAIN, "running")
    assert job_state(run.status()) == (INTERRUPTED, "job 7 is no longer in Slurm's queue")


@pytest.mark.parametrize("job_id", ["7", None])
def test_job_that_waits_for_another_allocation_and_left_the_queue_keeps_its_reason(
    tmp_path: Path, job_id: str | None
) -> None:
    run = RunFolder(tmp_path, scheduler="slurm" if job_id else "local")
    run.state(TRAIN, "waiting", job_id, "the allocation ends")
    end = "job 7 is no longer in Slurm's queue" if job_id else "its main process has ended"
    assert job_state(run.status()) == (INTERRUPTED, f"the allocation ends; {end}")


def test_local_job_without_a_main_process_is_interrupted(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    run.state(TRAIN, "running", job_id=None)
    assert job_state(run.status()) == (INTERRUPTED, "its main process has ended")
    run.main_process()
    status = run.status()
    assert job_state(status) == (RUNNING, "on n1, n2") and f"process {os.getpid()} on" in str(status.main_process)


def test_local_job_that_was_stopped_does_not_run_while_its_main_process_waits_for_others(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    run.main_process()
    run.state(JobId("environment"), "running", job_id=None)
    run.state(TRAIN, "waiting", job_id=None, reason="stopped by a signal")
    status = run.status()
    assert job_state(status) == (INTERRUPTED, "stopped by a signal") and status.state == RUNNING


@pytest.mark.parametrize("job_id", ["7", None])
@pytest.mark.parametrize("left", ["running", "waiting"])
def test_job_that_an_earlier_run_left_has_not_started_until_this_run_starts_it(
    tmp_path: Path, job_id: str | None, left: StateName
) -> None:
    """The main process does other jobs first, or was killed again before it came to this one."""
    run = RunFolder(tmp_path, scheduler="slurm" if job_id else "local")
    run.state(TRAIN, left, job_id, "stopped by a signal")
    JobsToRun("this run", {str(TRAIN): "2026-11-28T10:00:00+00:00"}).write(run.paths.jobs_to_run)
    assert job_state(run.status())[0] == INTERRUPTED
    run.main_process()
    assert job_state(run.status()) == (NOT_STARTED, "")
    if job_id:
        still = run.status(train_base=QueuedJob("7", "RUNNING", "None", "N/A"))
        assert job_state(still) == (RUNNING, "on n1, n2")


@pytest.mark.parametrize("scheduler", ["local", "slurm"])
def test_main_process_on_another_host_is_named_as_unchecked(tmp_path: Path, scheduler: str) -> None:
    """GPU-hours of a job that may have been killed with it do not grow."""
    run = RunFolder(tmp_path, scheduler=scheduler)
    run.train(10)
    run.state(TRAIN, "running", job_id=None)
    run.paths.job(TRAIN).history.write_text(json.dumps({"time_s": 10_000.0, "event": "running"}) + "\n")
    append_record(run.paths.stage("base").weights / "0123/metrics.jsonl", {"step": 10, "loss": 1.0, "time_s": 13_600.0})
    run.main_process(LeaseOwner("login9", 5, "1.0"))
    status = run.status()
    assert (status.main_process, status.unchecked_host) == ("process 5 on login9", "login9")
    assert job_state(status) == (RUNNING, "on n1, n2")
    hours = status.stages[0].gpu_hours
    assert hours is not None and (hours == pytest.approx(8)) == (scheduler == "local")
    run.main_process(LeaseOwner("login9", 5, "1.0", job_id="3"))
    controller = QueuedJob("3", "RUNNING", "None", "N/A")
    ended = read_status(run.paths, lambda jobs: Queue({}, {})).main_process
    assert (ended is None) == (scheduler == "slurm"), "its job has left the queue"
    checked = read_status(run.paths, lambda jobs: Queue({}, {"3": controller})).unchecked_host
    assert checked == ("" if scheduler == "slurm" else "login9"), "its job is in the queue"


def test_state_of_the_run_without_running_jobs(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.status().state == NOT_STARTED
    run.state(JobId("environment"), "done")
    assert run.status().state == INTERRUPTED  # jobs are left, and no main process works on the run
    run.state(TRAIN, "done")
    assert run.status().state == DONE


def test_slurm_that_does_not_answer_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.state(TRAIN, "running")

    def ask(jobs: object) -> Queue:
        raise UserError("squeue did not answer within 30 s")

    status = read_status(run.paths, ask)
    assert status.queue_problem == "squeue did not answer within 30 s" and job_state(status) == (RUNNING, "on n1, n2")


def test_gpu_hours_count_allocations_and_not_the_queue(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.train(40)
    events = [(0, "running"), (3600, "restarted"), (7200, "failed"), (9000, "running"), (9900, "done")]
    history = "".join(json.dumps({"time_s": float(t), "event": name}) + "\n" for t, name in events)
    run.paths.job(TRAIN).history.write_text(history)
    stage = run.status().stages[0]
    assert stage.gpu_hours_expected == pytest.approx(18 + 60 * 2.5 * 8 / 3600), "60 steps of 2.5 s are left"
    assert stage.gpu_hours == pytest.approx((7200 + 900) / 3600 * 8) and stage.gpu_hours_planned == (7.5, 9.0)


@pytest.mark.parametrize(("queue", "hours"), [("absent", 2), ("running", 5), ("unknown", 2)])
def test_gpu_hours_of_a_killed_job_do_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: str, hours: float
) -> None:
    """It began five hours ago and wrote its last metrics after two; only Slurm knows whether it still runs."""
    run = RunFolder(tmp_path)
    weights = run.train(40)
    run.state(TRAIN, "running")
    run.paths.job(TRAIN).history.write_text(json.dumps({"time_s": 10_000.0, "event": "running"}) + "\n")
    append_record(weights.metrics, {"step": 40, "validation_loss": 4.5, "time_s": 10_000.0 + 2 * 3600})
    monkeypatch.setattr(run_status.time, "time", lambda: 10_000.0 + 5 * 3600)
    if queue == "unknown":
        status = read_status(run.paths)
    else:
        status = run.status(**({"train_base": QueuedJob("7", "RUNNING", "None", "N/A")} if queue == "running" else {}))
    assert status.stages[0].gpu_hours == pytest.approx(8 * hours)


def test_gpu_hours_of_other_jobs_are_counted_apart(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    plan = json.loads(run.paths.plan.read_text())
    for row in plan["jobs"]:
        row["request"] = {"--nodes": "2", "--gres": "gpu:4"}
    run.paths.plan.write_text(json.dumps(plan))
    assert run.status().other_gpu_hours == 0
    for job, seconds in ((JobId("environment"), 360), (TRAIN, 7200)):
        history = [{"time_s": 1000.0, "event": "running"}, {"time_s": 1000.0 + seconds, "event": "done"}]
        run.paths.job(job).path.mkdir(parents=True, exist_ok=True)
        run.paths.job(job).history.write_text("".join(json.dumps(event) + "\n" for event in history))
        run.state(job, "done")
    # Also a run that ended before its first training has used them.
    assert "GPU-hours: 0 of 7.5 to 9 planned for the training steps, and 0.8 in" in summary_lines(run.status())[-1]
    run.train(40)
    status = run.status()
    assert status.other_gpu_hours == pytest.approx(0.8) and status.stages[0].gpu_hours == pytest.approx(16)
    assert (
        "GPU-hours: 16 of 7.5 to 9 planned for the training steps, and 0.8 in other jobs" in summary_lines(status)[-1]
    )


def test_training_on_cpus_has_no_gpu_hours(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.weights(device="cpu")
    assert run.status().stages[0].gpu_hours is None


def test_only_an_export_of_the_present_checkpoint_counts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    folder = JobFolder(run.paths.stage("base").path)
    entry: SavedCheckpoint = {"step": 100, "path": "checkpoints/step-00000100", "sha256": SHA, "validation_loss": None}
    Checkpoint("r", "base", str(folder.weights / "0123"), {}, {"last": entry}, 100, "d", "t").write(folder.checkpoint)
    path = "results/r/export/base"
    for sha, expected in ((SHA, str(tmp_path / path)), ("cd" * 32, None)):
        export = Export("base", "c", 100, path, "bf16", 1, 2, {}, {}, [], {"checkpoint_sha256": sha})
        run.paths.export_manifest("base").parent.mkdir(exist_ok=True)
        export.write(run.paths.export_manifest("base"))
        assert run.status().stages[0].exported_to == expected


def test_only_the_ends_of_a_long_metrics_file_are_read(tmp_path: Path) -> None:
    """A line in the middle that would stop a reader is never seen."""
    run = RunFolder(tmp_path)
    weights = run.train(40)
    lines = weights.metrics.read_text().splitlines(keepends=True)
    middle = '{"step": 41, "loss": 99.0}\n' * 10_000
    weights.metrics.write_text("".join(lines[:40]) + middle + " " * 100_000 + "\n" + "".join(lines[30:]))
    progress = run.status().stages[0].progress
    assert progress is not None and progress.loss == pytest.approx(4.645) and progress.first_loss == 4.99


def test_last_validation_is_found_far_before_the_last_step(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    weights = run.train(40)
    with weights.metrics.open("a") as stream:
        for step in range(41, 4000):
            stream.write(json.dumps({"step": step, "loss": 3.0, "step_time_s": 2.0}) + "\n")
    assert weights.metrics.stat().st_size > 2 * 64 * 1024
    progress = run.status().stages[0].progress
    assert progress is not None and (progress.step, progress.validation_loss) == (3999, 4.5)


def test_checkpoint_that_a_training_removes_meanwhile_is_left_out(tmp_path: Path) -> None:
    """A file that is listed and does not exist any more looks as a link to nothing does."""
    run = RunFolder(tmp_path)
    (run.train(40).checkpoint(30) / "gone.pt").symlink_to("nothing")
    progress = run.status().stages[0].progress
    assert progress is not None and progress.checkpoint_bytes == 1000


SERVE = JobId("serve", ("base",))


def serving(run: RunFolder, ready: bool = True) -> Endpoint:
    """Write the files of a server whose process is this one."""
    folder = run.paths.job(SERVE)
    folder.path.mkdir(parents=True)
    folder.launch_spec.write_text("{}")
    endpoint = Endpoint("http://10.0.0.1:8000/v1", "r-base", "vllm", "k.yaml", ready, LeaseOwner.this_process())
    endpoint.write(folder.endpoint)
    run.state(SERVE, "running")
    return endpoint


def test_a_server_that_runs_is_shown_with_its_endpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.status().servers == []
    endpoint = serving(run)
    (server,) = run.status(serve_base=QueuedJob("7", "RUNNING", "None", "N/A")).servers
    assert (server.job.state, server.job.detail, server.endpoint) == (RUNNING, "on n1, n2", endpoint)


def test_a_server_that_waits_has_no_endpoint_and_a_reason(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    serving(run)
    (server,) = run.status(serve_base=QueuedJob("7", "PENDING", "BeginTime", "N/A")).servers
    assert (server.job.state, server.job.detail, server.endpoint) == (QUEUED, "waits: BeginTime", None)


def test_a_server_that_failed_is_shown_and_one_that_was_stopped_is_not(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    serving(run)
    run.paths.job(SERVE).endpoint.unlink()
    Failure("environment", "no module named vllm", "install it").write(run.paths.job(SERVE).failure)
    (server,) = run.status().servers
    assert (server.job.state, server.job.detail) == (FAILED, "no module named vllm")
    Failure(CANCELLED, "cancelled by scancel", "").write(run.paths.job(SERVE).failure)
    assert run.status().servers == []


def test_a_server_without_slurm_runs_as_long_as_its_process(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, scheduler="local")
    endpoint = serving(run)
    run.state(SERVE, "running", None)
    (server,) = run.status().servers
    assert (server.job.state, server.endpoint) == (RUNNING, endpoint)
    replace(endpoint, owner=LeaseOwner(endpoint.owner.host, endpoint.owner.pid, "1.0")).write(
        run.paths.job(SERVE).endpoint
    )
    (server,) = run.status().servers
    assert (server.job.state, server.endpoint) == (INTERRUPTED, None)
    run.state(SERVE, "waiting", None)
    assert run.status().servers == []
