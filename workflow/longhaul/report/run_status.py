"""Collects what `longhaul status` shows: job states, time left, GPU-hours; loss and speed are those of stage_records.py.

Only small files and the ends of large ones are read, so that the answer comes within two seconds for 1,000 stages.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from longhaul.artifacts.artifact_schemas import Checkpoint, Export
from longhaul.artifacts.endpoint import Endpoint, read_endpoint
from longhaul.artifacts.job_state import (
    CANCELLED,
    Failure,
    JobsToRun,
    State,
    current_invocation,
    read_failure,
    read_jobs_to_run,
    read_state,
    unreadable_records,
)
from longhaul.artifacts.leases import Lease, LeaseOwner
from longhaul.artifacts.line_record_fields import Event, MetricsRow, read_events
from longhaul.artifacts.paths import QUARANTINE, SERVE_KIND, STAGE_KIND, JobId, RunPaths, WeightsFolder
from longhaul.artifacts.quarantine import quarantined_nodes
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.errors import UserError
from longhaul.report.failed_fetches import FailedFetch, failed_fetches
from longhaul.report.learning_result import LearningResult, learning_result, read_unigram_entropies
from longhaul.report.plan_json import PlanFile, StageRow
from longhaul.report.slurm_queue_types import AskQueue, Queue, QueuedJob
from longhaul.report.stage_records import (
    MetricsRows,
    bytes_below,
    line_count,
    planned_steps,
    read_rows,
    recent_loss,
    recent_median,
    step_seconds,
    weights_folder,
)
from longhaul.report.time_left import StageWork, training_left_s
from longhaul.report.used_gpu_hours import requested_gpu_hours, signs_of_life, used_gpu_hours

NOT_STARTED, QUEUED, RUNNING, DONE, FAILED, STARTS_AGAIN, INTERRUPTED, UNKNOWN, STARTING = (
    "not started",
    "queued",
    "running",
    "done",
    "failed",
    "failed, starts again",
    "interrupted",
    "unknown",
    "starting",
)
_OTHER_RELEASE = (
    "another release of longhaul wrote it, or its writer was stopped: read the run with that release, or run the same "
    "command again, which writes the file again"
)


@dataclass(frozen=True)
class Progress:
    """Progress of a stage's training, for status and report. None: the metrics do not hold the value yet. Losses are in nats per
    token. "The last steps" are RECENT_STEPS of stage_records.py.
    """

    step: int
    first_loss: float | None  # of the first step
    loss: float | None  # mean of the last 10 steps
    validation_loss: float | None  # the last one
    first_validation_loss: float | None  # before the first step
    tokens_per_s: float | None  # median of the last steps, as mfu; the report has the medians of all steps, too
    mfu: float | None
    seconds_left: float | None  # at the speed of the last steps; None once the stage has ended
    last_saved_step: int | None
    last_saved_s: float | None  # seconds since 1970
    attempts: int
    checkpoint_bytes: int
    step_s: float | None = None  # median of the last steps, waiting for data included


@dataclass(frozen=True)
class JobStatus:
    """One job of the run.

    detail: nodes, the reason it waits, or the cause of its failure
    folder: of its launch files and records; log: what its newest attempt printed
    """

    name: str
    kind: str
    state: str
    detail: str
    remedy: str = ""
    slurm_job_id: str | None = None
    since: str = ""
    folder: str = ""
    log: str = ""


@dataclass(frozen=True)
class JobCount:
    """How many jobs of the plan are done. A job that the run does again is not done until it has run again.

    What the main process does itself, such as fetch, render and report, is no job.
    """

    done: int
    planned: int

    def __str__(self) -> str:
        return f"{self.done} of {self.planned} jobs done"


@dataclass(frozen=True)
class StageStatus:
    """A training stage.

    steps: None until the samples of a length in epochs are counted
    progress: None before its first step
    gpu_hours: GPUs × hours, over all allocations; None without GPUs, or before the first allocation
    gpu_hours_expected: at the end of the stage, at the speed of the last steps; None once the stage has ended
    gpu_hours_planned: lowest and highest estimate for the training steps
    """

    name: str
    job: JobStatus
    steps: int | None
    progress: Progress | None
    gpu_hours: float | None
    gpu_hours_expected: float | None
    gpu_hours_planned: tuple[float, float] | None
    exported_to: str | None  # the verified Hugging Face folder
    estimated_steps: int | None = None  # of a length in epochs, by the plan
    learning: LearningResult | None = None


@dataclass(frozen=True)
class ServerStatus:
    """The job of `longhaul serve` for a stage.

    endpoint: where the server answers; None until the engine has started
    """

    job: JobStatus
    endpoint: Endpoint | None


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment."""

    run: str
    site: str
    folder: str
    main_process: str | None  # the process that owns the run; None when none works on it
    jobs: list[JobStatus]
    stages: list[StageStatus]
    quarantined: list[str]
    disk_free_bytes: int
    queue_problem: str  # why Slurm could not be asked; "" where it was asked, or where there is no Slurm
    report: str | None
    training_left_s: tuple[float, float] | None = None  # least and most, for the steps of all stages; None: unknown
    other_gpu_hours: float = 0.0  # GPUs × hours of checks, exports and other jobs in Slurm that are no trainings
    unchecked_host: str = ""  # the only host that knows whether the main process still runs; "" where it was checked
    servers: list[ServerStatus] = field(default_factory=list)
    failed_fetches: list[FailedFetch] = field(default_factory=list)  # [] while a main process works on the run

    @property
    def job_count(self) -> JobCount:
        return JobCount(sum(job.state == DONE for job in self.jobs), len(self.jobs))

    @property
    def jobs_and_servers(self) -> list[JobStatus]:
        """Return the jobs of the run, then those of its servers."""
        return [*self.jobs, *(server.job for server in self.servers)]

    @property
    def state(self) -> str:
        """Return failed, running, queued, unknown, done, starting (its jobs are not known yet), or interrupted: jobs are left
        and no main process works on the run.
        """
        if not self.jobs:
            return STARTING
        states = {job.state for job in self.jobs}
        if states == {DONE}:
            return DONE
        if self.failed_fetches:
            return FAILED
        return next(
            (state for state in (FAILED, RUNNING, QUEUED, UNKNOWN) if state in states), self._idle_state(states)
        )

    def _idle_state(self, states: set[str]) -> str:
        if self.main_process:
            return RUNNING
        return NOT_STARTED if states == {NOT_STARTED} else INTERRUPTED


def read_status(paths: RunPaths, ask_queue: AskQueue | None = None, main_process_ends: bool = False) -> RunStatus:
    """Read the status of a run.

    ask_queue:         called once, and only where the run's scheduler is Slurm
    main_process_ends: this is the main process, and it ends now: the status is the one that `longhaul status` reads afterwards

    Raises:
        UserError: the run has no plan.json yet, or another release wrote it.
    """
    plan = _read_plan(paths)
    jobs = _planned_jobs(plan)
    servers = [JobId(SERVE_KIND, (row["name"],)) for row in plan["stages"]]
    servers = [job for job in servers if paths.job(job).launch_spec.exists()]
    queue, problem = _ask(plan, [*jobs, *servers], ask_queue)
    owner = None if main_process_ends else _living_owner(paths, queue)

    trained = [JobId(STAGE_KIND, (row["name"],)) for row in plan["stages"]]
    to_run = read_jobs_to_run(paths)
    statuses = {job: _job_status(paths, job, queue, owner, to_run) for job in dict.fromkeys([*jobs, *trained])}
    unchecked_host = _unchecked_host(owner, queue)
    nobody_knows = queue is None if plan["scheduler"] == "slurm" else unchecked_host
    now_s = None if nobody_knows else time.time()
    rows = plan["stages"]
    entropies = read_unigram_entropies(paths, rows)
    stopped_early = owner is None and any(statuses[job].state != DONE for job in jobs)
    stages = [
        _stage_status(paths, row, statuses[job], entropies.get(row["dataset"]), now_s)
        for row, job in zip(rows, trained, strict=True)
    ]
    return RunStatus(
        run=paths.run,
        site=plan["site"],
        folder=str(paths.folder),
        main_process=str(owner) if owner else None,
        jobs=[statuses[job] for job in jobs],
        stages=stages,
        servers=list(filter(None, (_server_status(paths, job, queue) for job in servers))),
        quarantined=list(quarantined_nodes(paths.results / QUARANTINE.name)),
        disk_free_bytes=shutil.disk_usage(paths.folder).free,
        queue_problem=problem,
        report=str(paths.report) if paths.report.exists() else None,
        training_left_s=training_left_s([_work(row, stage) for row, stage in zip(rows, stages, strict=True)]),
        other_gpu_hours=_other_gpu_hours(paths, plan, statuses, now_s),
        unchecked_host=unchecked_host,
        failed_fetches=failed_fetches(paths, _evaluated_tasks(jobs)) if stopped_early else [],
    )


def starting_status(paths: RunPaths) -> RunStatus | None:
    """Return the status of a run whose main process has not written plan.json yet; None if there is no such process."""
    owner = None if paths.plan.exists() else _living_owner(paths, None)
    if owner is None:
        return None
    return RunStatus(
        run=paths.run,
        site="",
        folder=str(paths.folder),
        main_process=str(owner),
        jobs=[],
        stages=[],
        quarantined=[],
        disk_free_bytes=shutil.disk_usage(paths.results).free,
        queue_problem="",
        report=None,
        unchecked_host=_unchecked_host(owner, None),
    )


def _read_plan(paths: RunPaths) -> PlanFile:
    if not paths.plan.exists():
        raise UserError(
            f"{paths.folder.absolute()} holds no plan.json: nothing has run there yet",
            "start it with `longhaul run CONFIG`, or name another run's folder or config",
        )
    return read_typed_json(paths.plan, PlanFile, _OTHER_RELEASE)


def _planned_jobs(plan: PlanFile) -> list[JobId]:
    return [JobId(row["kind"], tuple(row["names"])) for row in plan["jobs"]]


def _evaluated_tasks(jobs: list[JobId]) -> list[tuple[str, str]]:
    """Return (stage, task) of the planned evaluations."""
    return [(job.names[0], job.names[2]) for job in jobs if job.kind == "evaluate"]


def _other_gpu_hours(
    paths: RunPaths, plan: PlanFile, statuses: Mapping[JobId, JobStatus], now_s: float | None
) -> float:
    jobs = [
        (JobId(row["kind"], tuple(row["names"])), row["request"]) for row in plan["jobs"] if row["kind"] != STAGE_KIND
    ]
    return sum(
        requested_gpu_hours(paths.job(job), request, now_s if statuses[job].state == RUNNING else None)
        for job, request in jobs
    )


def _ask(plan: PlanFile, jobs: list[JobId], ask_queue: AskQueue | None) -> tuple[Queue | None, str]:
    """Return the queue and why it is unknown. It is None where there is no Slurm, or where Slurm does not answer."""
    if plan["scheduler"] != "slurm" or ask_queue is None:
        return None, ""
    try:
        return ask_queue(jobs), ""
    except UserError as error:
        return None, error.message


def _living_owner(paths: RunPaths, queue: Queue | None) -> LeaseOwner | None:
    """Return the main process, unless it has certainly ended: on this host, or with its Slurm job."""
    owner = Lease(paths.lease).current_owner()
    if owner is None or owner.is_dead():
        return None
    job_has_ended = queue and owner.job_id and owner.job_id not in queue.by_id
    return None if job_has_ended and not owner.is_on_this_host else owner


def _unchecked_host(owner: LeaseOwner | None, queue: Queue | None) -> str:
    """Return the host of a main process that may have ended: another host, where it is no job in the queue."""
    is_queued = owner and queue and owner.job_id in queue.by_id
    return "" if owner is None or owner.is_on_this_host or is_queued else owner.host


def _job_status(
    paths: RunPaths, job: JobId, queue: Queue | None, owner: LeaseOwner | None, to_run: JobsToRun
) -> JobStatus:
    folder = paths.job(job)
    state, failure = read_state(folder.path), read_failure(folder.path)
    queued = queue.find(str(job), state.job_id if state else None) if queue else None
    if state and to_run.is_left(str(job), state):
        has_ended = state.job_id is None or (queue is not None and queued is None)
        if state.state == "done" or (owner and has_ended):
            state = None  # the main process has yet to run the job
    slurm_id = queued.job_id if queued else state.job_id if state else None

    def status(found: tuple[str, str], remedy: str = "", job_id: str | None = slurm_id, since: str = "") -> JobStatus:
        return JobStatus(
            str(job), job.kind, *found, remedy, job_id, since, str(folder.path), str(_newest_log(paths, job))
        )

    if queued and queued.state == "PENDING":
        return status((QUEUED, _pending_detail(queued)))
    if failure:
        # The main process owns no server, and starts none again.
        invocation = current_invocation(paths) if owner and job.kind != SERVE_KIND else ""
        found = _failed(failure, invocation, to_run.starts_again(str(job), invocation))
        return status(found, failure.remedy if found[0] == FAILED else "", failure.job_id, failure.time)
    if problem := next(unreadable_records(folder.path), ""):
        return status((UNKNOWN, problem), _OTHER_RELEASE)
    if state is None:
        return status((RUNNING, "the job is starting") if queued else (NOT_STARTED, ""))
    return status(_recorded(state, queue is not None and queued is None, owner), since=state.since)


def _server_status(paths: RunPaths, job: JobId, queue: Queue | None) -> ServerStatus | None:
    """Return the status of a server; None if it was stopped on purpose, or never started."""
    folder = paths.job(job)
    endpoint, failure, state = read_endpoint(folder.endpoint), read_failure(folder.path), read_state(folder.path)
    found = _job_status(paths, job, queue, endpoint.owner if endpoint else None, JobsToRun())
    was_stopped = found.state in (NOT_STARTED, DONE) or (failure and failure.failure_class == CANCELLED)
    ended_here = state and state.state == "waiting" and state.job_id is None
    if found.state != QUEUED and (was_stopped or ended_here):
        return None
    return ServerStatus(found, endpoint if found.state == RUNNING else None)


def _newest_log(paths: RunPaths, job: JobId) -> Path:
    """Return the log of the job's newest attempt; before the first one, and after `longhaul prune`, its rule's log."""
    logs = paths.attempt_logs(job).logs()
    return logs[-1] if logs else paths.log(job)


def _recorded(state: State, left_the_queue: bool, owner: LeaseOwner | None) -> tuple[str, str]:
    """Return state and detail by the supervisor's record, which stays `running` when the supervisor is killed."""
    if state.state == "done":
        return DONE, ""
    reason = f"{state.reason}; " if state.state == "waiting" and state.reason else ""
    if state.job_id and left_the_queue:
        return INTERRUPTED, f"{reason}job {state.job_id} is no longer in Slurm's queue"
    if state.job_id is None and owner is None:
        return INTERRUPTED, f"{reason}its main process has ended"
    if state.job_id is None and state.state == "waiting":  # it waits for no allocation: its supervisor has ended
        return INTERRUPTED, state.reason
    return RUNNING, f"on {', '.join(state.nodes)}"


def _failed(failure: Failure, invocation: str, is_to_run: bool) -> tuple[str, str]:
    """Return state and detail of a job that has failed.

    invocation: of the main process that works on the run; "" if none does
    is_to_run:  that process had to run the job when it started
    """
    if not invocation or failure.invocation != invocation:
        return (STARTS_AGAIN if is_to_run else FAILED), failure.cause
    if failure.next_attempt:
        return STARTS_AGAIN, f"{failure.next_attempt}: {failure.cause}"
    return FAILED, failure.cause


def _pending_detail(job: QueuedJob) -> str:
    start = "" if job.expected_start in ("", "N/A") else f", expected start {job.expected_start}"
    return f"waits: {job.reason}{start}"


def _stage_status(
    paths: RunPaths, row: StageRow, job: JobStatus, entropy_nats: float | None, now_s: float | None
) -> StageStatus:
    """Return the status of a stage.

    entropy_nats: of the token frequencies of its data
    now_s: the time now; None if it is not known whether a job whose record says `running` still runs
    """
    folder = paths.stage(row["name"])
    weights = weights_folder(folder)
    steps = planned_steps(row["steps"], weights)
    events = read_events(weights.events) if weights else []
    rows = read_rows(weights) if weights else MetricsRows([], [], [])
    progress = _progress(weights, rows, events, steps, job) if weights else None
    gpus = row["nodes"] * row["gpus_per_node"]
    seen_s = signs_of_life(events, [*rows.trained[-1:], *rows.validated])
    used = used_gpu_hours(folder, weights, seen_s, gpus, now_s if job.state == RUNNING else None)
    seconds_left = progress.seconds_left if progress else None
    return StageStatus(
        name=row["name"],
        job=job,
        steps=steps,
        progress=progress,
        gpu_hours=used,
        gpu_hours_expected=used + seconds_left / 3600 * gpus if used is not None and seconds_left is not None else None,
        gpu_hours_planned=row.get("gpu_hours_range"),
        exported_to=_exported_to(paths, row["name"]),
        estimated_steps=row.get("estimated_steps"),
        learning=_learning(row, progress, rows, entropy_nats) if progress else None,
    )


def _learning(
    row: StageRow, progress: Progress, rows: MetricsRows, entropy_nats: float | None
) -> LearningResult | None:
    validated = _validation_loss([validation for validation in rows.validated if validation["step"] > 0])
    loss = progress.loss if validated is None else validated
    return learning_result(row["kind"], loss, progress.first_validation_loss, entropy_nats)


def _work(row: StageRow, stage: StageStatus) -> StageWork:
    progress = stage.progress
    return StageWork(
        ranks=row["nodes"] * row["gpus_per_node"],
        steps=stage.steps,
        seconds_left=0.0 if stage.job.state == DONE else progress.seconds_left if progress else None,
        step_s=progress.step_s if progress else None,
        flops=row.get("flops"),
        gpu_hours=stage.gpu_hours_planned,
    )


def _progress(
    weights: WeightsFolder, rows: MetricsRows, events: list[Event], steps: int | None, job: JobStatus
) -> Progress:
    first_rows, trained, validated = rows
    step, step_s = trained[-1]["step"] if trained else 0, step_seconds(trained)
    saved = [event for event in events if event["event"] == "saved"]
    return Progress(
        step=step,
        first_loss=next((row["loss"] for row in first_rows if "loss" in row), None),
        loss=recent_loss(trained),
        first_validation_loss=_validation_loss(first_rows[:1], only_step=0),
        validation_loss=_validation_loss(validated),
        tokens_per_s=recent_median(trained, "tokens_per_s"),
        mfu=recent_median(trained, "mfu"),
        # Until it is trained again, a stage may have more steps than a config that was changed meanwhile.
        seconds_left=None if job.state == DONE or steps is None or step_s is None else step_s * max(0, steps - step),
        last_saved_step=saved[-1]["step"] if saved else None,
        last_saved_s=saved[-1]["time_s"] if saved else None,
        attempts=line_count(weights.attempts),
        checkpoint_bytes=bytes_below(weights.checkpoints),
        step_s=step_s,
    )


def _validation_loss(rows: list[MetricsRow], only_step: int | None = None) -> float | None:
    """Return the last validation loss of the rows, or that of one step."""
    found = [row["validation_loss"] for row in rows if "validation_loss" in row and only_step in (None, row["step"])]
    return found[-1] if found else None


def _exported_to(paths: RunPaths, stage: str) -> str | None:
    """Return where the stage's model was exported to, if the export is of its present checkpoint."""
    try:
        export = Export.read(paths.export_manifest(stage))
        current = Checkpoint.read(paths.stage(stage).checkpoint)
    except UserError:
        return None
    hashes = {entry["sha256"] for entry in current.checkpoints.values()}
    is_current = export.provenance.get("checkpoint_sha256") in hashes
    return str(paths.results.parent / export.path) if is_current else None
