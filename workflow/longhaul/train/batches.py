"""Cuts each global batch into this rank's micro batches (gradient accumulation), and reads them ahead in a thread."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import torch

from longhaul.data.sampling.sample_format import IGNORED_LABEL, Sample
from longhaul.data.sampling.samples import Samples, batch_of_step
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.distributed_context import DistributedContext


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward pass.

    input_ids, labels, position_ids: int64 [micro batch, sequence length]. A label of IGNORED_LABEL is not in the loss.
    tokens: number of tokens without padding; 0 where they are not counted
    attention_pairs: number of pairs of a token and one of its document that it attends to, itself included; 0 as above
    has_several_documents: whether a row holds several documents, or padding; None: not known
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    tokens: int = 0
    attention_pairs: int = 0
    has_several_documents: bool | None = None

    @property
    def loss_tokens(self) -> int:
        return int((self.labels != IGNORED_LABEL).sum())

    @classmethod
    def without_labels(cls, ids_T: torch.Tensor, device: torch.device) -> MicroBatch:
        """Return one sequence without any loss token, on `device`: for its logits alone."""
        ids_1T = ids_T[None].to(device)
        positions_1T = torch.arange(len(ids_T), device=device)[None]
        return cls(ids_1T, torch.full_like(ids_1T, IGNORED_LABEL), positions_1T)

    def to(self, device: torch.device) -> MicroBatch:
        tensors = (self.input_ids, self.labels, self.position_ids)
        if device.type == "cpu":
            return self
        ids, labels, positions = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return replace(self, input_ids=ids, labels=labels, position_ids=positions)


@dataclass(frozen=True)
class Batch:
    """One rank's part of global batch `number`.

    ids:         the samples of the whole global batch
    tokens, attention_pairs: those of this rank's micro batches, without padding
    loss_tokens: those of this rank's micro batches
    wait_s:      how long the step waited for the batch
    """

    number: int
    ids: np.ndarray
    micro_batches: list[MicroBatch]
    tokens: int
    loss_tokens: int
    attention_pairs: int = 0
    wait_s: float = 0.0

    @property
    def ids_digest(self) -> str:
        """Return a short hash of the global batch's samples; two runs with equal hashes saw the same data."""
        return hashlib.blake2b(np.ascontiguousarray(self.ids).tobytes(), digest_size=8).hexdigest()


_ReadAhead = queue.Queue[Batch | BaseException]


class Prefetcher:
    """Iterates over the batches of the remaining steps; a thread reads ahead while the step computes.

    After each batch it looks at the training state. When the state is not exactly one step further, because a batch was skipped
    or steps were rolled back, it discards what it read ahead and starts again at the state's next batch.
    """

    def __init__(
        self, samples: Samples | None, job: TrainSpec, context: DistributedContext, state: TrainingState
    ) -> None:
        if samples is None:
            raise ValueError("a stage trains on a split that has documents")
        self._samples, self._job, self._sample_rank, self._state = samples, job, context.dims.sample_rank, state
        self._device = context.device

    def __iter__(self) -> Iterator[Batch]:
        while self._state.step < self._job.steps:
            skipped = list(self._state.skipped)
            steps = range(self._state.step, self._job.steps)
            with self._reading(batch_of_step(step, skipped) for step in steps) as read_ahead:
                for step in steps:
                    if (self._state.step, self._state.skipped) != (step, skipped):
                        break
                    yield _next_batch(read_ahead)

    @contextmanager
    def _reading(self, numbers: Iterator[int]) -> Iterator[_ReadAhead]:
        read_ahead: _ReadAhead = queue.Queue(maxsize=2)
        stopped = threading.Event()
        thread = threading.Thread(target=self._read_all, args=(numbers, read_ahead, stopped), daemon=True)
        thread.start()
        try:
            yield read_ahead
        finally:
            stopped.set()
            while thread.is_alive():  # the thread may wait for a free place in the queue
                with suppress(queue.Empty):
                    read_ahead.get_nowait()
                thread.join(0.01)

    def _read_all(self, numbers: Iterator[int], read_ahead: _ReadAhead, stopped: threading.Event) -> None:
        try:
            if self._device.type == "cuda":
                # A new thread's current device is GPU 0; pinning memory would open a context there.
                torch.cuda.set_device(self._device)
            for number in numbers:
                if stopped.is_set():
                    return
                read_ahead.put(self._read(number))
        except BaseException as error:
            read_ahead.put(error)

    def _read(self, number: int) -> Batch:
        stage = self._job.stage
        ids = self._samples.ids(number, stage.global_batch_size)
        shape = (self._job.accumulation, self._job.data_parallel, stage.micro_batch_size)
        own_ids = ids.reshape(shape)[:, self._sample_rank]
        micro_batches = [collate(self._samples, row, self._device.type == "cuda") for row in own_ids]
        counts = {
            key: sum(getattr(micro, key) for micro in micro_batches)
            for key in ("tokens", "loss_tokens", "attention_pairs")
        }
        return Batch(number, ids, micro_batches, **counts)


def _next_batch(read_ahead: _ReadAhead) -> Batch:
    """Return the next batch, or raise the error that the reading thread met."""
    started = time.perf_counter()
    batch = read_ahead.get()
    if isinstance(batch, BaseException):
        raise batch
    return replace(batch, wait_s=time.perf_counter() - started)


def collate(samples: Samples, ids: np.ndarray, is_pinned: bool = False) -> MicroBatch:
    """Read samples, ids [micro batch], straight into the micro batch's memory.

    is_pinned: use pinned memory, so that the copy to the GPU does not block.
    """
    arrays = torch.empty((3, len(ids), samples.length), dtype=torch.int64, pin_memory=is_pinned)
    tokens = pairs = 0
    for row, index in enumerate(ids):
        sample = Sample(*arrays[:, row].numpy())
        filled = samples.fill(int(index), sample)
        tokens += filled
        pairs += filled + int(sample.position_ids[:filled].sum())  # a token attends to itself and those before it
    has_several_documents = bool((arrays[2].diff(dim=1) != 1).any())
    return MicroBatch(*arrays, tokens=tokens, attention_pairs=pairs, has_several_documents=has_several_documents)
