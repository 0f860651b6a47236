"""Low-rank gradients between data-parallel ranks: PowerSGD with error feedback (Vogels et al. 2019, arXiv:1905.13727).

The mathematics is that of torch's hook for DistributedDataParallel. It is given buckets of the gradients that DeepSpeed
was about to average at ZeRO 0 and 1; DeepSpeed then finds them averaged, and reduces nothing itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from longhaul.config.run_config import PowerSgd
from longhaul.jobs.specs import TrainSpec
from longhaul.planning.gpu_memory import POWERSGD_BUCKET

_TENSORS = ("error_dict", "p_memory_dict", "q_memory_dict")


@dataclass(frozen=True)
class Bucket:
    """Some of the gradients in fp32, with the methods that torch's hook asks DDP's bucket for."""

    place: int
    flat: torch.Tensor
    shapes: list[torch.Size]
    ends_step: bool

    def index(self) -> int:
        return self.place

    def buffer(self) -> torch.Tensor:
        return self.flat

    def gradients(self) -> list[torch.Tensor]:
        """Views of the buffer, vectors and matrices."""
        parts = self.flat.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def is_last(self) -> bool:
        return self.ends_step


class LowRankReduction:
    """Averages the gradients of an engine at ZeRO 0 or 1 over all ranks, once a step."""

    def __init__(self, engine: Any, settings: PowerSgd, bucket_elements: int = POWERSGD_BUCKET) -> None:
        self._settings, self._optimizer = settings, engine.optimizer if engine.zero_optimization_stage() else None
        self._buckets = list(_in_buckets(engine.module.parameters(), bucket_elements))
        self._state, self._before = self._fresh(), {}
        self._take_over(engine)

    def _fresh(self) -> PowerSGDState:
        return PowerSGDState(None, self._settings.rank, self._settings.start_step)

    def _take_over(self, engine: Any) -> None:
        optimizer = self._optimizer
        if optimizer is None:
            engine.buffered_allreduce_fallback = lambda *_arguments, **_options: self.reduce()
            return
        deal_out = optimizer.reduce_gradients

        def reduce_gradients(pipeline_parallel: bool = False) -> None:
            self.reduce()
            deal_out(pipeline_parallel)

        optimizer.reduce_gradients = reduce_gradients
        optimizer.gradient_average = False
        optimizer.allreduce_bucket = lambda bucket, *_arguments, **_options: optimizer.flatten(bucket)

    @torch.no_grad()
    def reduce(self) -> None:
        """Every rank calls it, with its own gradients of a whole step."""
        self._before = _kept(self._state)
        for place, members in enumerate(self._buckets):
            gradients = [self._gradient(parameter) for parameter in members]
            flat = torch.cat([gradient.flatten().float() for gradient in gradients])
            shapes = [shape for gradient in gradients for shape in _matrices(gradient.shape)]
            bucket: Any = Bucket(place, flat, shapes, place == len(self._buckets) - 1)
            # One after the other: ranks must agree on the order of their collectives.
            powerSGD_hook(self._state, bucket).wait()
            for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(averaged.view_as(gradient))

    def _gradient(self, parameter: Any) -> torch.Tensor:
        """Where DeepSpeed looks for the gradient; zeros if this rank made none."""
        name = "grad_accum" if self._optimizer is not None and self._optimizer.use_grad_accum_attribute else "grad"
        if getattr(parameter, name) is None:
            setattr(parameter, name, torch.zeros_like(parameter))
        return getattr(parameter, name)

    def finish_step(self, was_refused: bool) -> None:
        """Of a refused step nothing stays: its gradients may not even be finite."""
        if was_refused:
            for name, value in self._before.items():
                setattr(self._state, name, value)
        self._before = {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint: steps done, this rank's lost part of the gradients, the last thin matrices."""
        # On the CPU, as another rank may read it, with another device.
        tensors = {name: {k: tensor.cpu() for k, tensor in getattr(self._state, name).items()} for name in _TENSORS}
        return {"iter": self._state.iter, **tensors}

    def load(self, saved: Iterable[dict[str, Any]]) -> None:
        """Goes on from what one rank saved, or from what all ranks of another world size did.

        What those lost is not lost: every rank gets their mean, which is what the mean of the next gradients lacks.
        """
        states = iter(saved)
        first = next(states)
        errors, ranks = first["error_dict"], 1
        for other in states:
            ranks += 1
            for place, error in other["error_dict"].items():
                errors[place] += error
        self._state = self._fresh()
        self._state.iter = first["iter"]
        device = self._buckets[0][0].device
        for name in _TENSORS:
            getattr(self._state, name).update({place: value.to(device) for place, value in first[name].items()})
        for error in self._state.error_dict.values():
            error.div_(ranks)


def _matrices(shape: torch.Size) -> list[torch.Size]:
    """A mixture's experts lie in one tensor [experts, rows, columns]; each of them is a matrix of its own."""
    return [shape] if len(shape) <= 2 else [shape[1:]] * shape[0]


def _in_buckets(parameters: Iterable[torch.nn.Parameter], elements: int) -> Iterator[list[torch.nn.Parameter]]:
    """Neighbouring parameters that are trained, as many as have no more elements; a larger one is alone."""
    members: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if members and sum(p.numel() for p in members) + parameter.numel() > elements:
            yield members
            members = []
        members.append(parameter)
    yield members


def _kept(state: PowerSGDState) -> dict[str, Any]:
    """What a step changes. The hook makes the lost part anew each time, and works in place on the matrices."""
    matrices = {
        name: {place: matrix.clone() for place, matrix in getattr(state, name).items()}
        for name in ("p_memory_dict", "q_memory_dict")
    }
    return {"iter": state.iter, "rng": copy.deepcopy(state.rng), "error_dict": dict(state.error_dict), **matrices}


def compress_reduction(engine: Any, job: TrainSpec) -> LowRankReduction | None:
    """Has the engine reduce low-rank gradients, if the stage says so. Checkpoints find it at the engine."""
    settings = job.stage.communication.powersgd
    if settings is None:
        return None
    engine.low_rank = LowRankReduction(engine, settings)
    return engine.low_rank
