"""Limits that a healthy training keeps, for the acceptance table and the scale test; computes the spread of step times.
Limits are shares of 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from longhaul.artifacts.line_record_fields import TimeBreakdown

GPU_UTILISATION = 0.75
"""Minimum median share of time in which a kernel runs on a GPU."""
STEP_TIME_SPREAD = 0.05
"""Maximum distance of the middle 90 % of step times from their median."""
GPU_MEMORY = 0.9
"""Maximum peak of PyTorch's allocator, by the memory of the GPU."""
COMMUNICATION_EFFICIENCY = 0.85
"""Minimum share of profiled steps in which a rank does not wait for communication."""
DATA_WAIT = 0.05
"""Maximum share of the time of all steps in which a rank waits for its batch."""
COMPUTE_EFFICIENCY = 0.7
"""Minimum rate of the model's FLOPs while a rank computes, by the measured rate of matrix products."""
BANDWIDTH = 0.8
"""Minimum bus bandwidth of the largest all_reduce between nodes, by the sum of the rates of a node's RDMA ports."""
FEWEST_STEPS = 20
"""Steps that a spread of step times needs."""


def step_time_spread(times: Sequence[float]) -> float | None:
    """Return the largest relative distance of the middle 90 % from the median; None for fewer than FEWEST_STEPS steps."""
    if len(times) < FEWEST_STEPS:
        return None
    cuts, median = statistics.quantiles(times, n=20), statistics.median(times)
    return max(median - cuts[0], cuts[-1] - median) / median


def communication_efficiency(profiles: Iterable[TimeBreakdown]) -> float | None:
    """Return 1 - the share of time in which a communication kernel runs and no other, on the worst of the profiled ranks.

    None without kernels: on CPUs, operators hide each other.
    """
    found = [profile for profile in profiles if profile["has_kernels"]]
    return min((1 - one["covered_s"].get("communication", 0.0) / one["seconds"] for one in found), default=None)
