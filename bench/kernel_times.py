"""Time of a GPU in a step, by class of kernel, in microseconds for each token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType

from longhaul.train.monitoring.kernel_classes import CLASSES, kernel_class

STEPS, KERNELS, NAME_WIDTH = 2, 24, 110
IDLE = "idle"


def profile(step: Callable[[], Any], finish: Callable[[], Any], tokens: int) -> dict[str, Any]:
    """Run a few steps under torch's profiler.

    tokens: of a step

    Returns {"classes": class -> µs/token, "kernels": the longest kernels, name -> µs/token}.
    """
    finish()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        finish()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type == DeviceType.CUDA and event.time_range.end > event.time_range.start
    ]
    per_token = 1.0 / (STEPS * tokens)
    classes, kernels = times_by_class(spans)
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:KERNELS]
    return {
        "classes": {name: value * per_token for name, value in classes.items()},
        "kernels": {name[:NAME_WIDTH]: value * per_token for name, value in longest},
    }


def times_by_class(spans: list[tuple[str, float, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return (class -> time, kernel -> time) of (name, begin, end). `idle` is the time from first to last without a kernel."""
    classes: dict[str, float] = dict.fromkeys(CLASSES, 0.0) | {IDLE: 0.0}
    kernels: dict[str, float] = defaultdict(float)
    busy_until = min((begin for _, begin, _ in spans), default=0.0)
    for name, begin, end in sorted(spans, key=lambda span: span[1]):
        classes[kernel_class(name)] += end - begin
        kernels[name] += end - begin
        classes[IDLE] += max(0.0, begin - busy_until)
        busy_until = max(busy_until, end)
    return classes, dict(kernels)


def kernel_table(found: dict[str, dict[str, float]]) -> list[str]:
    """Return the longest kernels of each row."""
    lines = ["the longest kernels of each row in µs/token"]
    for row, kernels in found.items():
        lines += ["", row, *(f"{time:8.3f} {name}" for name, time in kernels.items())]
    return lines


def class_table(found: dict[str, dict[str, float]]) -> list[str]:
    """Return a table of the rows' classes."""
    if not found:
        return []
    width = max(len(name) for name in found)
    names = [*CLASSES, IDLE]
    lines = ["time of the GPU by class of kernel in µs/token, from torch's profiler"]
    lines.append(f"{'':{width}} " + " ".join(f"{name:>24}" for name in names))
    for row, classes in found.items():
        lines.append(f"{row:{width}} " + " ".join(f"{classes[name]:24.2f}" for name in names))
    return lines
