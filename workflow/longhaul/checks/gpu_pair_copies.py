"""Copies data between every two GPUs of a node, in both directions: at which rate, and whether the same bytes arrive.

One pair copies at a time. Pairs that copy at once share PCIe switches, the link between the CPUs, and on GPUs with direct links
those of a third GPU, so healthy pairs of one kind would differ. 28 pairs of 8 GPUs take about a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from longhaul.checks.burn_in import copy_seconds
from longhaul.checks.measurement_types import GpuPair
from longhaul.checks.pair_schedule import order_of_rounds, pairs_of_round
from longhaul.checks.run_parts_in_child import announce

Copy = Callable[[torch.Tensor, torch.Tensor], float]
"""Copies the second tensor into the first one, and returns the seconds that it took."""
_COPIES = 5
"""Per direction; the fastest one counts. During the first one, the driver opens the path between the GPUs."""
_LIMIT_S = 5.0
_BYTES_PER_WORD = 4


class _Buffers:
    """The bytes that a GPU sends, and the memory in which it receives."""

    def __init__(self, number: int, device: torch.device, words: int) -> None:
        self.number = number
        self.sent_W = _words_of(number, device, words)
        self.received_W = torch.empty_like(self.sent_W)

    def receive(self, sender: _Buffers, copy: Copy) -> tuple[float, int]:
        """Return the seconds of the fastest copy, and how many bytes are wrong after the last one."""
        self.received_W.zero_()
        seconds = min(copy(self.received_W, sender.sent_W) for _ in range(_COPIES))
        expected_W = _words_of(sender.number, self.received_W.device, self.received_W.numel())
        is_wrong = self.received_W.view(torch.uint8) != expected_W.view(torch.uint8)
        return seconds, int(is_wrong.sum())


def copy_between_gpus(
    devices: Sequence[torch.device], copy_bytes: int, copy: Copy = copy_seconds, limit_s: float = _LIMIT_S
) -> list[GpuPair]:
    """Measure every pair of devices; after `limit_s` seconds no further one: each device has then met as many others.

    copy_bytes: bytes of one copy
    """
    if len(devices) < 2:
        return []
    words = copy_bytes // _BYTES_PER_WORD
    buffers = [_Buffers(number, device, words) for number, device in enumerate(devices)]
    end, found = time.monotonic() + limit_s, list[GpuPair]()
    for round_number in order_of_rounds(len(devices)):
        for first, second in pairs_of_round(len(devices), round_number):
            found.append(_measure_pair(buffers[first], buffers[second], copy))
        if time.monotonic() >= end:
            break
    return sorted(found, key=lambda pair: (pair.first, pair.second))


def _measure_pair(first: _Buffers, second: _Buffers, copy: Copy) -> GpuPair:
    """Return how a pair copies.

    Raises:
        RuntimeError: it cannot. CUDA's text, such as that of an NVLink error, names no GPU.
    """
    announce("copies between two GPUs", [first.number, second.number])
    try:
        there, wrong_there = second.receive(first, copy)
        back, wrong_back = first.receive(second, copy)
    except RuntimeError as error:
        pair = f"GPU {first.number} and GPU {second.number} by torch's numbers"
        raise RuntimeError(f"copies between {pair}: {error}") from error
    rate = first.sent_W.numel() * _BYTES_PER_WORD / max(there, back) / 1e9
    return GpuPair(first.number, second.number, round(rate, 3), wrong_there + wrong_back)


def _words_of(number: int, device: torch.device, words: int) -> torch.Tensor:
    """Return what GPU `number` sends. Its words differ from each other and from those of other GPUs, and wrap around."""
    return torch.arange(words, dtype=torch.int32, device=device) * (2 * number + 3) + number + 1
