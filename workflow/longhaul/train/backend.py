"""What computes a step: DeepSpeed's engine around the whole model, or around a pipeline of its layers.

Both give the same numbers for the same global batch. Sums that a backend returns are this rank's share: ranks that
compute the same thing, as tensor-parallel ones do, must not count it twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch

from longhaul.jobs.specs import TrainSpec
from longhaul.train.bad_steps import StepGuard
from longhaul.train.batches import Batch, MicroBatch
from longhaul.train.build_model import read_deepspeed_config
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.loss import global_loss, head_loss_sum, loss_sum
from longhaul.train.parallel.expert_balance import ExpertLoad
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.sequence_balance_loss import SequenceBalance
from longhaul.train.powersgd import compress_reduction


class Backend(Protocol):
    """`model` is the Hugging Face model (or this rank's part of it), `engine` DeepSpeed's around it."""

    engine: Any
    guard: StepGuard
    load: ExpertLoad
    balance: SequenceBalance
    dims: ParallelDims

    def train(self, batch: Batch, tokens: float) -> float:
        """One optimizer step over a global batch of `tokens` loss tokens, which the guard may refuse; the mean token loss."""
        ...

    def evaluate(self, micro: MicroBatch) -> float:
        """The sum of a micro batch's token losses, without gradients, in evaluation mode."""
        ...

    def logits(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Logits [1, T, V] of one sequence, in evaluation mode; every rank takes part, rank 0's are whole."""
        ...


def make_backend(job: TrainSpec, model: Any, processes: DistributedContext) -> Backend:
    """Wraps a built model; every rank of the job calls it."""
    kind = PipelinedModel if job.stage.parallel.pipeline > 1 else WholeModel
    return kind(job, model, processes)


class WholeModel:
    """The Hugging Face model itself: ZeRO 0-3, with tensor, expert and sequence parallelism inside it."""

    def __init__(self, job: TrainSpec, model: Any, processes: DistributedContext) -> None:
        self._job, self._processes, self._device, self.dims = job, processes, processes.device, processes.dims
        if self.dims.parallel.sequence > 1:
            from longhaul.train.parallel.sequence_parallel import split_sequences

            split_sequences(model, self.dims)
        self._model = model
        self.load = ExpertLoad(model, self.dims, job.stage.router_bias_update_rate)
        self.balance = SequenceBalance(model, self.dims, job)
        self.engine = make_engine(job, model, processes)
        self._low_rank = compress_reduction(self.engine, job)
        self.guard = StepGuard(self.engine)

    def train(self, batch: Batch, tokens: float) -> float:
        """Forward and backward of this rank's micro batches."""
        total = 0.0
        self.guard.begin(lambda: self._processes.sum(self._share(total)) / max(1.0, tokens))
        for micro in batch.micro_batches:
            summed = self._loss_sum(micro)
            self.engine.backward(global_loss(summed, tokens, self.dims.data, self._job.accumulation))
            if self.engine.is_gradient_accumulation_boundary():
                self.guard.measure_plain()
            total += summed.item()
            self.engine.step()
        loss = self.guard.finish()
        if self._low_rank:
            self._low_rank.finish_step(was_refused=bool(self.guard.reason))
        return loss

    def evaluate(self, micro: MicroBatch) -> float:
        self.engine.eval()
        with torch.no_grad():
            total = self._loss_sum(micro).item()
        self.engine.train()
        return self._share(total)

    def _loss_sum(self, micro: MicroBatch) -> torch.Tensor:
        micro = micro.to(self._device)
        if self.dims.parallel.sequence > 1:
            from longhaul.train.parallel.sequence_parallel import local_tokens

            micro = local_tokens(self._model, micro, self.dims)
        return loss_sum(self.engine, micro, self.dims)

    def _share(self, total: float) -> float:
        return total if self.dims.tensor_rank == 0 else 0.0

    def logits(self, ids_T: torch.Tensor) -> torch.Tensor:
        ids_1T = ids_T[None].to(self._device)
        positions = torch.arange(len(ids_T), device=self._device)[None]
        micro = MicroBatch(ids_1T, torch.full_like(ids_1T, -100), positions)
        if self.dims.parallel.sequence > 1:
            from longhaul.train.parallel.sequence_parallel import local_tokens

            micro = local_tokens(self._model, micro, self.dims)
        self.engine.eval()
        with torch.no_grad():
            options = {"position_ids": micro.position_ids} if self.dims.parallel.sequence > 1 else {}
            found = self.engine(input_ids=micro.input_ids, use_cache=False, **options).logits
        self.engine.train()
        return _whole_logits(found, self.dims)


class PipelinedModel:
    """Stages of decoder layers over ranks; inside a stage tensor and expert parallelism, ZeRO 1 over the data ranks."""

    def __init__(self, job: TrainSpec, model: Any, processes: DistributedContext) -> None:
        from longhaul.train.parallel.pipeline_parallel import as_pipeline

        self._job, self._processes, self._device, self.dims = job, processes, processes.device, processes.dims
        self._scale, self._head = 1.0, model.lm_head
        self.load = ExpertLoad(model, self.dims, job.stage.router_bias_update_rate)
        self.balance = SequenceBalance(model, self.dims, job)
        self.engine = make_engine(job, as_pipeline(model, self.dims, self._loss), processes)
        self.guard = StepGuard(self.engine)

    def _loss(self, hidden_BSH: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        return head_loss_sum(self._head, hidden_BSH, labels_BS, self.dims) * self._scale

    def train(self, batch: Batch, tokens: float) -> float:
        # The engine divides by micro batches and data ranks; its mean over them is then the global mean.
        self._scale = self.dims.data * self._job.accumulation / max(1.0, tokens)
        self.guard.begin(self._mean_loss)
        self.engine.train_batch(data_iter=self._inputs(batch.micro_batches))
        return self.guard.finish()

    def _mean_loss(self) -> float:
        """The engine itself sums it up after the step, which is too late to refuse it."""
        own = 0.0
        if self.dims.is_last_stage and self.dims.tensor_rank == 0:
            own = float(self.engine.total_loss) / self._job.accumulation / self.dims.data
        return self._processes.sum(own)

    def evaluate(self, micro: MicroBatch) -> float:
        self._scale = float(self.dims.data)
        found = self.engine.eval_batch(self._inputs([micro]), num_micro_batches=1)
        self.engine.train()
        return found.item() if self.dims.rank == 0 else 0.0

    def logits(self, ids_T: torch.Tensor) -> torch.Tensor:
        ids_1T = ids_T[None].to(self._device)
        positions = torch.arange(len(ids_T), device=self._device)[None]
        micro = MicroBatch(ids_1T, torch.full_like(ids_1T, -100), positions)
        self.engine.reset_activation_shape()
        _, hidden = self.engine.eval_batch(self._inputs([micro]), return_logits=True, num_micro_batches=1)
        self.engine.reset_activation_shape()
        self.engine.train()
        with torch.no_grad():
            whole = _whole_logits(self._head(hidden), self.dims) if hidden is not None else None
        return self._to_rank_0(whole, len(ids_T))

    def _to_rank_0(self, logits: torch.Tensor | None, length: int) -> torch.Tensor:
        """The last stage's logits, sent from its first rank."""
        last = self.dims.world_size - self.dims.data * self.dims.parallel.tensor
        if self.dims.rank == last and logits is not None:
            torch.distributed.send(logits.float().contiguous(), 0)
        found = torch.empty(1, length, self._job.model["vocab_size"], device=self._device)
        if self.dims.rank == 0:
            torch.distributed.recv(found, last)
        return found

    def _inputs(self, micro_batches: list[MicroBatch]) -> Iterator[Any]:
        for micro in micro_batches:
            moved = micro.to(self._device)
            yield (moved.input_ids, moved.position_ids), moved.labels


def _whole_logits(logits: torch.Tensor, dims: ParallelDims) -> torch.Tensor:
    """Logits [1, T, V] from parts of the tokens or of the vocabulary."""
    if dims.parallel.sequence > 1:
        parts = [torch.empty_like(logits) for _ in range(dims.parallel.sequence)]
        torch.distributed.all_gather(parts, logits.contiguous(), group=dims.group("sequence"))
        return torch.cat(parts, 1)
    if dims.parallel.tensor > 1:
        from longhaul.train.parallel.tensor_parallel import gather_vocabulary

        return gather_vocabulary(logits, dims)
    return logits


def make_engine(job: TrainSpec, module: Any, processes: DistributedContext) -> Any:
    """deepspeed.initialize, with no weight decay on norms and biases. A PipelineModule brings its own dims."""
    import deepspeed

    parameters = cast(Any, _parameter_groups(job, module))  # its annotation says Module, its code takes groups
    parallel = job.stage.parallel
    mpu = processes.dims if parallel.tensor > 1 and parallel.pipeline == 1 else None
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=parameters, config=read_deepspeed_config(job, processes), mpu=mpu
    )
    if mpu and job.stage.zero.stage == 3:
        # DeepSpeed takes all experts for those of its AutoEP, which no tensor rank splits; ours are marked as split.
        cast(Any, engine.optimizer)._grad_norm_counts_every_rank = lambda *_: False
    return engine


def _parameter_groups(job: TrainSpec, module: Any) -> list[dict[str, Any]]:
    """Weights that decay and weights that do not; experts that are spread over ranks in groups of their own."""
    decay = job.stage.optimizer.weight_decay
    found: dict[tuple[bool, str | None], list[Any]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            key = (_dimensions(parameter) >= 2, getattr(parameter, "group_name", None))
            found.setdefault(key, []).append(parameter)
    groups = []
    for (decays, experts), members in sorted(found.items(), key=lambda item: (item[0][1] or "", not item[0][0])):
        groups.append({"params": members, "weight_decay": decay if decays else 0.0})
        if experts:
            groups[-1] |= {"moe": True, "name": experts}
    return groups


def _dimensions(parameter: Any) -> int:
    """Dimensions of the whole parameter; ZeRO-3 leaves an empty vector in its place."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
