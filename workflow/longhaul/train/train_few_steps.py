"""Trains a stage for its first steps with the real engine and data, saves nothing, and returns what the steps took."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from longhaul.artifacts.artifact_schemas import DataManifest, TokenizerManifest
from longhaul.artifacts.line_record_fields import MetricsRow, StepProfile, TimeBreakdown
from longhaul.artifacts.line_records import read_lines
from longhaul.artifacts.paths import WeightsFolder
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.config.acceptance_limits import communication_efficiency
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.runtime.heartbeat import Heartbeat
from longhaul.train.batches import Prefetcher
from longhaul.train.build_model import build_model, build_model_config
from longhaul.train.checkpoint.checkpoint_manager import CheckpointManager
from longhaul.train.distributed_context import DistributedContext, distributed_context
from longhaul.train.initial_weights import set_initial_master_weights
from longhaul.train.monitoring.events import EventWriter
from longhaul.train.monitoring.metrics import Metrics, device_numbers
from longhaul.train.monitoring.profile_steps import StepProfiler
from longhaul.train.open_samples import open_samples
from longhaul.train.out_of_memory import names_smaller_settings
from longhaul.train.phase_times import StartUpTimes
from longhaul.train.step_backends import build_backend
from longhaul.train.trainer import Trainer


@dataclass(frozen=True)
class MeasuredSteps:
    """Measurements of the steps of a short training.

    rows:             one line of metrics per step, in order; rank 0 alone has them
    gpu_memory_share: peak of PyTorch's allocator by the memory of the GPU, on the fullest GPU; None without GPUs
    hosts:            in the order of the ranks
    communication_efficiency: see config.acceptance_limits; None where no kernels were profiled
    """

    rows: list[MetricsRow]
    gpu_memory_share: float | None
    hosts: list[str]
    is_main: bool
    communication_efficiency: float | None = None


def train_few_steps(job: TrainSpec) -> MeasuredSteps:
    """Train job.steps steps from the stage's first weights; every rank calls this. What it writes is deleted.

    The shards are not verified against their hashes, as the weights are deleted: the stage itself verifies them.

    Raises:
        UserError: the number of ranks or nodes differs from the plan, or the inputs do not fit together.
    """
    with (
        distributed_context(job) as context,
        Heartbeat(context.rank, Path(job.folder), job.stage.recovery.heartbeat_timeout_s),
        names_smaller_settings(job),
        _empty_folder(Path(job.weights_root), context) as folder,
    ):
        _train(job, context, folder)
        rows = (
            [line.record for line in read_lines(WeightsFolder(folder).metrics, MetricsRow)] if context.is_main else []
        )
        shares = context.gather(_gpu_memory_share(context.device))
        profiles = context.gather(_own_profile(folder, context.rank.rank))
        hosts = list(dict.fromkeys(context.gather(context.rank.host)))
    steps = [row for row in rows if row is not None and row.get("loss") is not None]
    return MeasuredSteps(
        steps,
        max((share for share in shares if share), default=None),
        hosts,
        context.is_main,
        communication_efficiency(filter(None, profiles)),
    )


def _train(job: TrainSpec, context: DistributedContext, folder: Path) -> None:
    start_up = StartUpTimes()
    tokenizer, data = TokenizerManifest.read(Path(job.tokenizer)), DataManifest.read(Path(job.data))
    samples = open_samples(job, data, "train", WeightsFolder(folder).samples, context)
    backend = build_backend(job, build_model(job, tokenizer, None, context), context)
    model = build_model_config(job, tokenizer)
    set_initial_master_weights(backend.engine, job, model, None, context)
    events = EventWriter(folder if context.is_main else None)
    checkpoints = CheckpointManager(folder, job, context, events)
    state = checkpoints.resume(backend.engine)
    metrics = Metrics(job, folder, state.step, context, model.to_dict(), events, {})
    trainer = Trainer(job, context, backend, None, {}, checkpoints, metrics, events, state, start_up)
    with closing(StepProfiler(job, context, folder)) as profiler:
        for batch in Prefetcher(samples, job, context, state):
            profiler.begin_step(state.step + 1)
            trainer.step(batch)
            profiler.end_step()
    checkpoints.close()
    metrics.close()


@contextmanager
def _empty_folder(folder: Path, context: DistributedContext) -> Iterator[Path]:
    """Make a folder without what an earlier attempt left in it, and delete it afterwards."""
    if context.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    context.barrier()
    yield folder
    context.barrier()
    if context.is_main:
        shutil.rmtree(folder, ignore_errors=True)


def _own_profile(folder: Path, rank: int) -> TimeBreakdown | None:
    """Return what this rank's profile shows. None: it is not profiled, or could not write its profile."""
    path = WeightsFolder(folder).profile(rank)
    return read_typed_json(path, StepProfile)["breakdown"] if path.exists() else None


def _gpu_memory_share(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    peak = device_numbers(device)["memory_bytes"] or 0
    return peak / torch.cuda.get_device_properties(device).total_memory
