"""Computes one step (forward, backward, update, accumulation) in two ways: DeepSpeed's engine around the whole model, or around a
pipeline of its layers.

Both give the same numbers for the same global batch. Sums that a backend returns are this rank's terms: where several ranks
compute the same thing, as tensor ranks do, only one of them returns it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from transformers import PreTrainedModel

from longhaul.compat.deepspeed import Engine
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.batches import Batch, MicroBatch
from longhaul.train.deepspeed_engine import build_engine
from longhaul.train.detect_bad_steps import BadStepFilter, Examined, build_bad_step_filter
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.loss import head_loss_sum, loss_sum, scale_to_global_mean
from longhaul.train.parallel.expert_balance_loss import SequenceBalanceLoss
from longhaul.train.parallel.expert_load_balancing import ExpertLoad
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.powersgd import install_powersgd


class Backend(Protocol):
    """DeepSpeed's engine around a model, with what examines and counts its steps."""

    engine: Engine
    bad_steps: BadStepFilter
    load: ExpertLoad
    balance: SequenceBalanceLoss
    dims: ParallelDims

    def train(self, batch: Batch, tokens: torch.Tensor) -> Examined:
        """Run one optimizer step and return its mean token loss and gradient norm.

        tokens: loss tokens of the global batch, a scalar. Weights and moments stay as they are where the step is bad.
        """
        ...

    def evaluate(self, micro: MicroBatch) -> float:
        """Return this rank's term of the sum of the token losses, without gradients, in evaluation mode."""
        ...

    def logits(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Return the logits [1, T, V] of one sequence, in evaluation mode; all ranks call this, rank 0's are complete."""
        ...


def build_backend(job: TrainSpec, model: PreTrainedModel, context: DistributedContext) -> Backend:
    """Return the backend of the stage's parallel layout around a built model; all ranks call this."""
    kind = PipelineBackend if job.stage.parallel.pipeline > 1 else WholeModelBackend
    return kind(job, model, context)


class WholeModelBackend:
    """The Hugging Face model itself: ZeRO 0 to 3, with tensor, expert and sequence parallelism inside it."""

    def __init__(self, job: TrainSpec, model: PreTrainedModel, context: DistributedContext) -> None:
        self._job, self._context, self._device, self.dims = job, context, context.device, context.dims
        if self.dims.parallel.sequence > 1:
            from longhaul.train.parallel.sequence_parallel import apply_sequence_parallel

            apply_sequence_parallel(model, self.dims)
        self._model = model
        self.load = ExpertLoad(model, self.dims, job.stage, self._device)
        self.balance = SequenceBalanceLoss(model, self.dims, job, self._device)
        self.engine = build_engine(job, model, context)
        self._powersgd = install_powersgd(self.engine, job)
        # PowerSGD restores its own state when it sees that a step was bad, before the next one.
        self.bad_steps = build_bad_step_filter(
            self.engine, waits_for_result=bool(job.stage.bad_steps.spike_factor or self._powersgd)
        )

    def train(self, batch: Batch, tokens: torch.Tensor) -> Examined:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        self.bad_steps.begin(lambda: self._context.sums_on_device([self._own_term(total)])[0] / tokens.clamp(min=1.0))
        for micro in batch.micro_batches:
            summed = self._loss_sum(micro)
            self.engine.backward(scale_to_global_mean(summed, tokens, self.dims.data, self._job.accumulation))
            if self.engine.is_gradient_accumulation_boundary():
                self.bad_steps.measure_unwrapped_norm()
            total += summed.detach()
            self.engine.step()
        examined = self.bad_steps.finish()
        if self._powersgd:
            self._powersgd.finish_step(was_bad=bool(examined.is_bad))
        return examined

    def evaluate(self, micro: MicroBatch) -> float:
        self.engine.eval()
        with torch.no_grad():
            total = self._loss_sum(micro)
        self.engine.train()
        return self._own_term(total).item()

    def _loss_sum(self, micro: MicroBatch) -> torch.Tensor:
        return loss_sum(self.engine, self._own_tokens(micro.to(self._device)), self.dims)

    def _own_tokens(self, micro: MicroBatch) -> MicroBatch:
        """Return the tokens of the micro batch that this rank computes: all of them without sequence parallelism."""
        if self.dims.parallel.sequence == 1:
            return micro
        from longhaul.train.parallel.sequence_parallel import slice_tokens

        return slice_tokens(self._model, micro, self.dims)

    def _own_term(self, total: torch.Tensor) -> torch.Tensor:
        return total if self.dims.tensor_rank == 0 else torch.zeros_like(total)

    def logits(self, ids_T: torch.Tensor) -> torch.Tensor:
        micro = self._own_tokens(MicroBatch.without_labels(ids_T, self._device))
        self.engine.eval()
        with torch.no_grad():
            options = {"position_ids": micro.position_ids} if self.dims.parallel.sequence > 1 else {}
            own_logits = self.engine(input_ids=micro.input_ids, use_cache=False, **options).logits
        self.engine.train()
        return _gather_logits(own_logits, self.dims)


class PipelineBackend:
    """A pipeline of decoder layers over ranks, with tensor and expert parallelism inside each pipeline rank; ZeRO 0 or 1."""

    def __init__(self, job: TrainSpec, model: PreTrainedModel, context: DistributedContext) -> None:
        from longhaul.train.parallel.pipeline_parallel import build_pipeline_module

        self._job, self._context, self._device, self.dims = job, context, context.device, context.dims
        self._scale, self._head = 1.0, model.lm_head
        self.load = ExpertLoad(model, self.dims, job.stage, self._device)
        self.balance = SequenceBalanceLoss(model, self.dims, job, self._device)
        # A window of text has no document borders (longhaul.data.sampling.sample_format).
        has_several_documents = False if job.stage.kind == "pretrain" else None
        module = build_pipeline_module(model, self.dims, self._loss, has_several_documents)
        self.engine = build_engine(job, module, context)
        self.bad_steps = BadStepFilter(self.engine)

    def _loss(self, hidden_BSH: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        return head_loss_sum(self._head, hidden_BSH, labels_BS, self.dims) * self._scale

    def train(self, batch: Batch, tokens: torch.Tensor) -> Examined:
        # The engine averages over micro batches and data ranks; with this factor its mean is the global batch's.
        self._scale = self.dims.data * self._job.accumulation / max(1.0, tokens.item())
        self.bad_steps.begin(self._mean_loss)
        self.engine.train_batch(data_iter=self._inputs(batch.micro_batches))
        return self.bad_steps.finish()

    def _mean_loss(self) -> torch.Tensor:
        """Return the global batch's mean loss before the update; the engine itself computes it only after the update."""
        own = 0.0
        if self.dims.is_last_pipeline_rank and self.dims.tensor_rank == 0:
            own = float(self.engine.total_loss) / self._job.accumulation / self.dims.data
        return self._context.sums_on_device([own])[0]

    def evaluate(self, micro: MicroBatch) -> float:
        self._scale = float(self.dims.data)
        total = self.engine.eval_batch(self._inputs([micro]), num_micro_batches=1)
        self.engine.train()
        return total.item() if self.dims.rank == 0 else 0.0

    def logits(self, ids_T: torch.Tensor) -> torch.Tensor:
        micro = MicroBatch.without_labels(ids_T, self._device)
        # The sequence is shorter than those of training, and the engine keeps the shape of its activations.
        self.engine.reset_activation_shape()
        _, hidden = self.engine.eval_batch(self._inputs([micro]), return_logits=True, num_micro_batches=1)
        self.engine.reset_activation_shape()
        self.engine.train()
        with torch.no_grad():
            logits = _gather_logits(self._head(hidden), self.dims) if hidden is not None else None
        return self._send_to_rank_0(logits, len(ids_T))

    def _send_to_rank_0(self, logits: torch.Tensor | None, length: int) -> torch.Tensor:
        """Send the last pipeline rank's logits from the first of its data and tensor ranks to rank 0."""
        sender = self.dims.world_size - self.dims.data * self.dims.parallel.tensor
        if self.dims.rank == sender and logits is not None:
            torch.distributed.send(logits.float().contiguous(), 0)
        received = torch.empty(1, length, self._job.model["vocab_size"], device=self._device)
        if self.dims.rank == 0:
            torch.distributed.recv(received, sender)
        return received

    def _inputs(
        self, micro_batches: list[MicroBatch]
    ) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        for micro in micro_batches:
            moved = micro.to(self._device)
            yield (moved.input_ids, moved.position_ids), moved.labels


def _gather_logits(logits: torch.Tensor, dims: ParallelDims) -> torch.Tensor:
    """Return logits [1, T, V] from slices of the tokens (sequence ranks) or of the vocabulary (tensor ranks)."""
    if dims.parallel.sequence > 1:
        parts = [torch.empty_like(logits) for _ in range(dims.parallel.sequence)]
        torch.distributed.all_gather(parts, logits.contiguous(), group=dims.group("sequence"))
        return torch.cat(parts, 1)
    if dims.parallel.tensor > 1:
        from longhaul.train.parallel.tensor_parallel import gather_vocabulary

        return gather_vocabulary(logits, dims)
    return logits
