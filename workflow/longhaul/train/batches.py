"""Samples -> this rank's micro batches, in an order that depends on the step alone."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from longhaul.data.sampling.samples import Sample, Samples, batch_of_step
from longhaul.jobs.specs import TrainSpec
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.distributed_context import DistributedContext


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
    """One rank's share of global batch `number`; ids are those of the whole."""

    number: int
    ids: np.ndarray
    micro_batches: list[MicroBatch]
    loss_tokens: int
    wait_s: float = 0.0

    @property
    def ids_digest(self) -> str:
        """A short hash of the global batch's samples: two runs that agree in it saw the same data."""
        return hashlib.blake2b(np.ascontiguousarray(self.ids).tobytes(), digest_size=8).hexdigest()


class Prefetcher:
    """Iterates the batches of the steps that are left; a thread reads ahead while the step computes.

    When the state did not move on by one step, because a batch is skipped or steps are done again, it reads anew.
    """

    def __init__(
        self, samples: Samples | None, job: TrainSpec, processes: DistributedContext, state: TrainingState
    ) -> None:
        if samples is None:
            raise ValueError("a stage trains on a split that has documents")
        self._samples, self._job, self._share, self._state = samples, job, processes.dims.sample_rank, state
        self._device = processes.device

    def __iter__(self) -> Iterator[Batch]:
        while self._state.step < self._job.steps:
            skipped = list(self._state.skipped)
            steps = range(self._state.step, self._job.steps)
            with self._reading(batch_of_step(step, skipped) for step in steps) as found:
                for step in steps:
                    if (self._state.step, self._state.skipped) != (step, skipped):
                        break
                    yield _take(found)

    @contextmanager
    def _reading(self, numbers: Iterator[int]) -> Iterator[queue.Queue[Batch | BaseException]]:
        found: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=2)
        stopped = threading.Event()
        thread = threading.Thread(target=self._read_ahead, args=(numbers, found, stopped), daemon=True)
        thread.start()
        try:
            yield found
        finally:
            stopped.set()
            while thread.is_alive():  # it may wait for room
                with suppress(queue.Empty):
                    found.get_nowait()
                thread.join(0.01)

    def _read_ahead(self, numbers: Iterator[int], found: queue.Queue[Any], stopped: threading.Event) -> None:
        try:
            if self._device.type == "cuda":
                # a new thread's is the first one: pinning would open a context there
                torch.cuda.set_device(self._device)
            for number in numbers:
                if stopped.is_set():
                    return
                found.put(self._read(number))
        except BaseException as error:
            found.put(error)

    def _read(self, number: int) -> Batch:
        stage = self._job.stage
        ids = self._samples.ids(number, stage.global_batch_size)
        mine = ids.reshape(self._job.accumulation, self._job.data_parallel, stage.micro_batch_size)[:, self._share]
        micro_batches = [collate(self._samples, row, self._device.type == "cuda") for row in mine]
        return Batch(number, ids, micro_batches, sum(micro.loss_tokens for micro in micro_batches))


def _take(found: queue.Queue[Batch | BaseException]) -> Batch:
    started = time.perf_counter()
    batch = found.get()
    if isinstance(batch, BaseException):
        raise batch
    return replace(batch, wait_s=time.perf_counter() - started)


def collate(samples: Samples, ids: np.ndarray, is_pinned: bool = False) -> MicroBatch:
    """Samples [micro batch], read straight into the batch's memory: pinned, a copy to the GPU waits for nobody."""
    arrays = torch.empty((3, len(ids), samples.length), dtype=torch.int64, pin_memory=is_pinned)
    for row, index in enumerate(ids):
        samples.fill(int(index), Sample(*arrays[:, row].numpy()))
    return MicroBatch(*arrays)


def validation_batches(samples: Samples, job: TrainSpec, processes: DistributedContext) -> Iterator[MicroBatch]:
    """The first `max_samples` samples, dealt to the ranks; all ranks make equally many passes (ZeRO-3 gathers in each)."""
    count = min(len(samples), job.stage.validation.max_samples)
    per_pass = job.stage.micro_batch_size * job.data_parallel
    for first in range(0, count, per_pass):
        mine = np.arange(job.stage.micro_batch_size) + first + processes.dims.sample_rank * job.stage.micro_batch_size
        batch = collate(samples, np.minimum(mine, count - 1))
        batch.labels[torch.from_numpy(mine >= count)] = -100
        yield batch
