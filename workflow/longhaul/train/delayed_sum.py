"""Sums a number over all ranks once a step; on GPUs each call returns the sum of the call before, so no rank waits."""

from __future__ import annotations

from longhaul.train.distributed_context import DistributedContext
from longhaul.train.host_copy import HostCopy


class DelayedSum:
    """A sum over all ranks, once a step. Every rank gets the same number in the same call, so all decide alike.

    On a GPU the sum of this step is complete only when the GPU has finished the step. The CPU would wait for it, and the GPU
    would then wait for the CPU. The sum of the step before is complete already.
    """

    def __init__(self, context: DistributedContext) -> None:
        self._context = context
        self._is_delayed = context.device.type == "cuda"
        self._given: HostCopy | None = None

    def next(self, own: float) -> float:
        """Give this rank's number. Return the sum: on CPUs of this call, on GPUs of the previous one, 0 in the first call."""
        given: HostCopy | None = HostCopy({"sum": self._context.sums_on_device([own])})
        if self._is_delayed:
            given, self._given = self._given, given
        return given.read()["sum"].item() if given else 0.0
