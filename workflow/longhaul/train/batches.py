"""Samples -> this rank's micro batches, in an order that depends on the step alone."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from longhaul.data.samples import Samples
from longhaul.jobs import StageJob
from longhaul.train.processes import Processes


@dataclass(frozen=True)
class MicroBatch:
    """input_ids, labels, position_ids: int64 [micro batch, sequence length]; label -100 is not in the loss."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor

    @property
    def loss_tokens(self) -> int:
        return int((self.labels != -100).sum())

    def to(self, device: torch.device) -> MicroBatch:
        tensors = (self.input_ids, self.labels, self.position_ids)
        return self if device.type == "cpu" else MicroBatch(*(t.to(device, non_blocking=True) for t in tensors))


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch; ids are those of the whole."""

    ids: np.ndarray
    micro_batches: list[MicroBatch]
    loss_tokens: int
    wait_s: float = 0.0

    @property
    def ids_digest(self) -> str:
        """A short hash of the global batch's samples: two runs that agree in it saw the same data."""
        return hashlib.blake2b(np.ascontiguousarray(self.ids).tobytes(), digest_size=8).hexdigest()


class Prefetcher:
    """Iterates the batches of steps first_step … job.steps - 1; a thread reads ahead while the step computes."""

    def __init__(self, samples: Samples | None, job: StageJob, processes: Processes, first_step: int) -> None:
        if samples is None:
            raise ValueError("a stage trains on a split that has documents")
        self._samples, self._job, self._share = samples, job, processes.grid.sample_rank
        self._steps = range(first_step, job.steps)
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=2)

    def __iter__(self) -> Iterator[Batch]:
        threading.Thread(target=self._read_ahead, daemon=True).start()
        for _ in self._steps:
            started = time.perf_counter()
            found = self._queue.get()
            if isinstance(found, BaseException):
                raise found
            yield Batch(found.ids, found.micro_batches, found.loss_tokens, time.perf_counter() - started)

    def _read_ahead(self) -> None:
        try:
            for step in self._steps:
                self._queue.put(self._read(step))
        except BaseException as error:
            self._queue.put(error)

    def _read(self, step: int) -> Batch:
        stage = self._job.stage
        ids = self._samples.ids(step, stage.global_batch)
        mine = ids.reshape(self._job.accumulation, self._job.data_parallel, stage.micro_batch)[:, self._share]
        micro_batches = [collate(self._samples, row) for row in mine]
        return Batch(ids, micro_batches, sum(micro.loss_tokens for micro in micro_batches))


def collate(samples: Samples, ids: np.ndarray) -> MicroBatch:
    """Stacks samples [micro batch]."""
    rows = [samples[int(index)] for index in ids]
    names = ("input_ids", "labels", "position_ids")
    return MicroBatch(*(torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in names))


def validation_batches(samples: Samples, job: StageJob, processes: Processes) -> Iterator[MicroBatch]:
    """The first `max_samples` samples, dealt to the ranks; all ranks make equally many passes (ZeRO-3 gathers in each)."""
    count = min(len(samples), job.stage.validation.max_samples)
    per_pass = job.stage.micro_batch * job.data_parallel
    for first in range(0, count, per_pass):
        mine = np.arange(job.stage.micro_batch) + first + processes.grid.sample_rank * job.stage.micro_batch
        batch = collate(samples, np.minimum(mine, count - 1))
        batch.labels[torch.from_numpy(mine >= count)] = -100
        yield batch
