"""Copies small results of a step (loss, norms) to the CPU without a wait; checkpoints use host_snapshot.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class HostCopy:
    """Named tensors on their way to the CPU. On a CPU they are there already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        self._arrived = torch.cuda.Event() if any(tensor.is_cuda for tensor in tensors.values()) else None
        if self._arrived:
            self._arrived.record()

    def read(self) -> dict[str, torch.Tensor]:
        """Wait until the copies are complete. Work that the device got later does not count."""
        if self._arrived:
            self._arrived.synchronize()
        return self._tensors
