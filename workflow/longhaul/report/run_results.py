"""Collects all values of the report from a run's files: stages, attempts, saves, epochs, job timespans. Parts that the run has
not made yet are None or absent.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from longhaul.artifacts.artifact_schemas import (
    Artifact,
    Checkpoint,
    Count,
    DataManifest,
    EnvironmentReport,
    Export,
    TokenizerManifest,
    failed_path,
)
from longhaul.artifacts.atomic_files import read_bytes
from longhaul.artifacts.evaluation_result import EvaluationResult
from longhaul.artifacts.fabric_report import FabricReport
from longhaul.artifacts.line_record_fields import START_UP_PHASES, Attempt, Event, StepProfile, read_events
from longhaul.artifacts.line_records import read_records
from longhaul.artifacts.pack_totals import cut_loss_share, share_of_padding
from longhaul.artifacts.paths import JobFolder, JobId, RunPaths, WeightsFolder
from longhaul.artifacts.scale_test_report import ScaleTestReport
from longhaul.artifacts.serve_check_result import ServeCheckResult
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.report.goodput import Goodput, read_goodput
from longhaul.report.metric_series import MetricSeries, Summary, read_metrics, summarise
from longhaul.report.number_format import duration, finite
from longhaul.report.plan_json import PlanFile, StageRow
from longhaul.report.run_status import RunStatus, read_status
from longhaul.report.slurm_queue_types import AskQueue
from longhaul.report.stage_records import planned_steps, read_pack_totals, weights_folder

A = TypeVar("A", bound=Artifact)
_MOST_SECONDS = 10**9  # dates beyond the year 9999 cannot be shown


@dataclass(frozen=True)
class Save:
    """One save of a checkpoint: seconds that training waited, and seconds until the checkpoint was complete."""

    waited_s: float
    durable_s: float


@dataclass(frozen=True)
class StageResults:
    """One stage that has begun to train: its plan, its attempts and its metrics."""

    name: str
    kind: str
    trained_steps: int
    planned_steps: int | None  # None until the samples of a length in epochs are counted
    attempts: list[Attempt]
    metrics: MetricSeries
    summary: Summary
    skipped_batches: int
    planned_memory_bytes: float | None  # of the rank that needs the most GPU memory
    padding_share: float | None  # of the positions in an epoch's packs; None where nothing is packed
    cut_loss_share: float | None  # of the training split's loss tokens, which no pack holds
    unigram_entropy_nats: float | None
    goodput: Goodput | None
    saves: list[Save]
    start_up: dict[
        str, float
    ]  # of the last attempt with a step: phase -> seconds from the start of rank 0's process on
    profiles: list[StepProfile]  # of the ranks that profile_steps recorded
    pair_check: FabricReport | None  # of the stage's own nodes before its last attempt; None if it was not measured

    @property
    def epochs(self) -> dict[str, float]:
        """Return by dataset the number of epochs that the stage trained."""
        return self.attempts[-1].get("epochs", {}) if self.attempts else {}

    @property
    def hosts(self) -> list[str]:
        """Return the hosts of all attempts, each once."""
        return list(dict.fromkeys(host for attempt in self.attempts for host in attempt["hosts"]))


@dataclass(frozen=True)
class JobTimespan:
    """Start and end of a job's last try, in seconds since 1970."""

    job: str
    start_s: float
    end_s: float

    @property
    def duration(self) -> str:
        return duration(self.end_s - self.start_s)


@dataclass(frozen=True)
class RunResults:
    """Everything that the report shows, in the order of the pipeline."""

    plan: PlanFile
    config: str  # empty until rule `render` has copied it
    status: RunStatus
    environment: EnvironmentReport | None
    fabric: FabricReport | None
    scale_tests: list[ScaleTestReport]
    tokenizer: TokenizerManifest | None
    data: list[DataManifest]
    stages: list[StageResults]
    exports: list[Export]
    evaluations: list[EvaluationResult]
    serve_checks: list[ServeCheckResult]
    timespans: list[JobTimespan]


def read_run(folder: Path, ask_queue: AskQueue | None = None, main_process_ends: bool = False) -> RunResults:
    """Read what a run has made so far.

    folder:    results/<run>
    ask_queue: asks Slurm for the jobs in its queue; without it, states are those that the jobs recorded last
    main_process_ends: as in read_status

    Raises:
        UserError: there is no plan.json yet, an artifact is damaged, or another release wrote it.
    """
    paths = RunPaths(folder.name, folder.parent)
    status = read_status(paths, ask_queue, main_process_ends)
    plan = read_typed_json(paths.plan, PlanFile)
    manifests = {name: paths.manifest(name) for name in sorted({row["dataset"] for row in plan["stages"]})}
    data = {name: DataManifest.read(path) for name, path in manifests.items() if path.exists()}
    exports = [paths.export_manifest(row["name"]) for row in plan["stages"]]
    stages = [_read_stage(paths, row, data.get(row["dataset"])) for row in plan["stages"]]
    return RunResults(
        plan=plan,
        config=read_bytes(paths.config).decode(errors="replace") if paths.config.exists() else "",
        status=status,
        environment=_read_if_made(EnvironmentReport, paths.environment)
        or _read_if_made(EnvironmentReport, failed_path(paths.environment)),
        fabric=_read_if_made(FabricReport, paths.fabric),
        scale_tests=[ScaleTestReport.read(path) for path in paths.scale_tests()],
        tokenizer=_read_if_made(TokenizerManifest, paths.tokenizer),
        data=list(data.values()),
        stages=[stage for stage in stages if stage],
        exports=[Export.read(path) for path in exports if path.exists()],
        evaluations=[EvaluationResult.read(path) for path in paths.evaluations()],
        serve_checks=[ServeCheckResult.read(path) for path in paths.serve_checks()],
        timespans=_read_timespans(paths, plan),
    )


def _read_if_made(kind: type[A], path: Path) -> A | None:
    return kind.read(path) if path.exists() else None


def _read_stage(paths: RunPaths, row: StageRow, data: DataManifest | None) -> StageResults | None:
    """Read a stage's results; None before its first attempt. `row` is the stage's entry in plan.json."""
    stage = paths.stage(row["name"])
    checkpoint = _read_if_made(Checkpoint, stage.checkpoint)
    weights = weights_folder(stage)
    if weights is None and checkpoint:
        weights = WeightsFolder(stage.working_folder() / checkpoint.weights)
    if weights is None:
        return None
    metrics = read_metrics(weights.metrics)
    skipped = weights.skipped_batches
    packs = read_pack_totals(weights)
    events = read_events(weights.events)
    return StageResults(
        name=row["name"],
        kind=row["kind"],
        trained_steps=int(max(metrics.curves["loss"].x, default=0)),
        planned_steps=planned_steps(row["steps"], weights),
        attempts=read_records(weights.attempts, Attempt),
        metrics=metrics,
        summary=summarise(metrics),
        skipped_batches=len(read_typed_json(skipped, list[Count])) if skipped.exists() else 0,
        planned_memory_bytes=(row["memory_per_gpu_gib"] or {}).get("total", 0) * 2**30 or None,
        padding_share=share_of_padding(packs),
        cut_loss_share=cut_loss_share(packs),
        unigram_entropy_nats=data.unigram_entropy_nats if data else None,
        goodput=read_goodput(stage.path, weights.path),
        saves=[
            Save(event["saving_s"], event.get("durable_s", event["saving_s"]))  # older releases wrote synchronously
            for event in events
            if event["event"] == "saved"
        ],
        start_up=_last_start_up(events),
        pair_check=_read_if_made(FabricReport, stage.pair_check_report),
        profiles=[read_typed_json(path, StepProfile) for path in weights.written_profiles()],
    )


def _last_start_up(events: list[Event]) -> dict[str, float]:
    """Return phase -> seconds of the newest event `start_up`; {} where there is none."""
    found = [event for event in events if event["event"] == "start_up"]
    return {phase: found[-1][f"{phase}_s"] for phase in START_UP_PHASES} if found else {}


def _read_timespans(paths: RunPaths, plan: PlanFile) -> list[JobTimespan]:
    """Return when each job ran: how long, from Snakemake's benchmark file, until its supervisor recorded that it is done.

    A job without that record ends when its benchmark file was written.
    """
    found = []
    for row in plan["jobs"]:
        job = JobId(row["kind"], tuple(row["names"]))
        path = paths.benchmark(job)
        if seconds := _benchmark_s(path):
            end_s = _done_s(paths.job(job)) or path.stat().st_mtime
            found.append(JobTimespan(str(job), end_s - seconds, end_s))
    return sorted(found, key=lambda timespan: timespan.start_s)


def _done_s(job: JobFolder) -> float | None:
    """Return when a job was recorded as done for the last time; None if it never was."""
    done_s = [event["time_s"] for event in read_events(job.history) if event["event"] == "done"]
    return done_s[-1] if done_s else None


def _benchmark_s(path: Path) -> float | None:
    """Return the seconds in the last row of a benchmark file, or None where there is no file or no such row."""
    if not path.exists():
        return None
    with path.open(encoding="utf-8", errors="replace") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    try:
        seconds = finite(float(rows[-1]["s"]))
    except (LookupError, TypeError, ValueError):
        return None
    return seconds if seconds is None or abs(seconds) < _MOST_SECONDS else None
