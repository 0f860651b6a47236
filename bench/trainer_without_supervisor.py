"""The trainer of a stage and its batches, for benchmarks that run steps: nothing is validated, saved or supervised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from longhaul.artifacts.artifact_schemas import DataManifest, TokenizerManifest
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.batches import Batch, Prefetcher
from longhaul.train.build_model import build_model
from longhaul.train.checkpoint.checkpoint_manager import CheckpointManager
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.monitoring.events import EventWriter
from longhaul.train.monitoring.metrics import Metrics
from longhaul.train.open_samples import open_samples
from longhaul.train.phase_times import StartUpTimes
from longhaul.train.step_backends import build_backend
from longhaul.train.trainer import Trainer


def build_trainer(job: TrainSpec, context: DistributedContext, folder: Path) -> tuple[Trainer, Iterator[Batch]]:
    """Return a trainer with initial weights, and its batches; metrics.jsonl goes to `folder`."""
    tokenizer = TokenizerManifest.read(Path(job.tokenizer))
    samples = open_samples(job, DataManifest.read(Path(job.data)), "train", folder, context)
    assert samples is not None, "the dataset has no training split"
    backend = build_backend(job, build_model(job, tokenizer, None, context), context)
    events, state = EventWriter(None), TrainingState()
    metrics = Metrics(job, folder, 0, context, job.model, events, {})
    checkpoints = CheckpointManager(folder, job, context, events)
    trainer = Trainer(job, context, backend, None, {}, checkpoints, metrics, events, state, StartUpTimes())
    return trainer, iter(Prefetcher(samples, job, context, state))
