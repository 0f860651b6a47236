"""Compresses gradients between data ranks with PowerSGD and error feedback (communication.powersgd).

The mathematics is that of torch's hook for DistributedDataParallel. The hook gets buckets of the gradients that DeepSpeed is
about to average at ZeRO 0 and 1. Afterwards DeepSpeed finds them averaged, and reduces nothing itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from longhaul.compat.deepspeed import Engine, average_gradients_with, gradient_attribute
from longhaul.config.communication_config import PowerSgd
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.planning.constants_shared_with_trainer import POWERSGD_BUCKET_ELEMENTS

_MATRICES = ("p_memory_dict", "q_memory_dict")
_TENSORS = ("error_dict", *_MATRICES)


@dataclass(frozen=True)
class GradientBucket:
    """Some of the gradients in fp32, with the methods of DDP's GradBucket that torch's hook calls."""

    place: int
    flat: torch.Tensor
    shapes: list[torch.Size]
    ends_step: bool

    def index(self) -> int:
        return self.place

    def buffer(self) -> torch.Tensor:
        return self.flat

    def gradients(self) -> list[torch.Tensor]:
        """Return views of the buffer: vectors and matrices."""
        parts = self.flat.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def is_last(self) -> bool:
        return self.ends_step


class PowerSgdReducer:
    """Averages the gradients of an engine at ZeRO 0 or 1 over all ranks, once a step."""

    def __init__(self, engine: Engine, settings: PowerSgd, bucket_elements: int = POWERSGD_BUCKET_ELEMENTS) -> None:
        self._settings, self._engine = settings, engine
        self._buckets = list(_in_buckets(engine.module.parameters(), bucket_elements))
        self._state, self._before_step = self._new_state(), {}
        average_gradients_with(engine, self.reduce)

    def _new_state(self) -> PowerSGDState:
        return PowerSGDState(None, self._settings.rank, self._settings.start_step)

    @torch.no_grad()
    def reduce(self) -> None:
        """Average this rank's gradients of a whole step with those of the others; every rank calls this."""
        self._before_step = _copy_of(self._state)
        attribute = gradient_attribute(self._engine)
        for place, members in enumerate(self._buckets):
            gradients = [_gradient(parameter, attribute) for parameter in members]
            flat = torch.cat([gradient.flatten().float() for gradient in gradients])
            shapes = [shape for gradient in gradients for shape in _matrices(gradient.shape)]
            bucket: Any = GradientBucket(place, flat, shapes, place == len(self._buckets) - 1)
            # One bucket after the other: ranks must agree on the order of their collectives.
            powerSGD_hook(self._state, bucket).wait()
            for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(averaged.view_as(gradient))

    def finish_step(self, was_bad: bool) -> None:
        """Restore the state from before a bad step: its gradients may not even be finite."""
        if was_bad:
            for name, value in self._before_step.items():
                setattr(self._state, name, value)
        self._before_step = {}

    def state(self) -> dict[str, object]:
        """Return the state for a checkpoint: steps done, this rank's compression error, the last low-rank matrices."""
        # On the CPU, as another rank with another device may read it.
        tensors = {name: {k: tensor.cpu() for k, tensor in getattr(self._state, name).items()} for name in _TENSORS}
        return {"iter": self._state.iter, **tensors}

    def load(self, saved: Iterable[dict[str, Any]]) -> None:
        """Load the state of one rank, or the states of all ranks of another world size.

        In the second case every rank gets the mean of their compression errors. That is what the mean of the next gradients
        lacks, so nothing is lost.
        """
        states = iter(saved)
        first = next(states)
        errors, ranks = first["error_dict"], 1
        for other in states:
            ranks += 1
            for place, error in other["error_dict"].items():
                errors[place] += error
        self._state = self._new_state()
        self._state.iter = first["iter"]
        device = self._buckets[0][0].device
        for name in _TENSORS:
            getattr(self._state, name).update({place: value.to(device) for place, value in first[name].items()})
        for error in self._state.error_dict.values():
            error.div_(ranks)


def _gradient(parameter: torch.nn.Parameter, attribute: str) -> torch.Tensor:
    """Return the gradient that DeepSpeed averages; zeros if this rank computed none."""
    if getattr(parameter, attribute) is None:
        setattr(parameter, attribute, torch.zeros_like(parameter))
    return getattr(parameter, attribute)


def _matrices(shape: torch.Size) -> list[torch.Size]:
    """Return the shapes to compress: experts are one tensor [experts, rows, columns], and each is a matrix of its own."""
    return [shape] if len(shape) <= 2 else [shape[1:]] * shape[0]


def _in_buckets(parameters: Iterable[torch.nn.Parameter], elements: int) -> Iterator[list[torch.nn.Parameter]]:
    """Yield neighbouring trained parameters with at most `elements` elements together; a larger parameter is alone."""
    members: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if members and sum(p.numel() for p in members) + parameter.numel() > elements:
            yield members
            members = []
        members.append(parameter)
    yield members


def _copy_of(state: PowerSGDState) -> dict[str, object]:
    """Return what a step changes. The hook replaces the errors, and changes the matrices in place."""
    matrices = {name: {place: matrix.clone() for place, matrix in getattr(state, name).items()} for name in _MATRICES}
    return {"iter": state.iter, "rng": copy.deepcopy(state.rng), "error_dict": dict(state.error_dict), **matrices}


def install_powersgd(engine: Engine, job: TrainSpec) -> PowerSgdReducer | None:
    """Let the engine reduce low-rank gradients, if the stage says so. The checkpoint modules find the reducer at the engine."""
    settings = job.stage.communication.powersgd
    if settings is None:
        return None
    engine.powersgd = PowerSgdReducer(engine, settings)
    return engine.powersgd
