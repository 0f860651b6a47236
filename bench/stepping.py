"""A stage's trainer and its batches, to be stepped by a benchmark: nothing is validated, saved or supervised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from longhaul.artifacts.schemas import DataManifest, TokenizerManifest
from longhaul.jobs.specs import TrainSpec
from longhaul.train.backend import make_backend
from longhaul.train.batches import Batch, Prefetcher
from longhaul.train.build_model import build_model
from longhaul.train.checkpoint.manager import Checkpoints
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.loop import Trainer, open_samples
from longhaul.train.monitoring.events import Events
from longhaul.train.monitoring.metrics import Metrics


def open_trainer(job: TrainSpec, processes: DistributedContext, folder: Path) -> tuple[Trainer, Iterator[Batch]]:
    """Of first weights; metrics.jsonl goes to `folder`."""
    tokenizer = TokenizerManifest.read(Path(job.tokenizer))
    samples = open_samples(job, DataManifest.read(Path(job.data)), "train", folder, processes)
    assert samples is not None, "the dataset has no training split"
    backend = make_backend(job, build_model(job, tokenizer, None, processes), processes)
    events, state = Events(None), TrainingState()
    metrics = Metrics(job, folder, 0, processes, job.model, events)
    checkpoints = Checkpoints(folder, job, processes, events)
    trainer = Trainer(job, processes, backend, None, {}, checkpoints, metrics, events, state)
    return trainer, iter(Prefetcher(samples, job, processes, state))
