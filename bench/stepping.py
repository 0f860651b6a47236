"""A stage's trainer and its batches, to be stepped by a benchmark: nothing is validated, saved or supervised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from longhaul.artifacts import DataManifest, TokenizerManifest
from longhaul.jobs import StageJob
from longhaul.train.backend import make_backend
from longhaul.train.batches import Batch, Prefetcher
from longhaul.train.checkpoints import Checkpoints
from longhaul.train.events import Events
from longhaul.train.loop import Trainer, open_samples
from longhaul.train.metrics import Metrics
from longhaul.train.model import build_model
from longhaul.train.processes import Processes
from longhaul.train.state import TrainingState


def open_trainer(job: StageJob, processes: Processes, folder: Path) -> tuple[Trainer, Iterator[Batch]]:
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
