"""Decides which NVLinks of NVIDIA GPUs have too many errors: new ones during a check, or far more than the GPU's other links.

A sum since the driver was loaded says little: each link of two healthy H200 had 40 to 300 errors. What NVIDIA's tools do:
- DCGM (github.com/NVIDIA/DCGM: MonitorNVLink4Fields in modules/health/DcgmHealthWatch.cpp, common/DcgmGPUHardwareLimits.h)
  compares two readings. CRC errors are a failure from 100/s, in the sum of a GPU's links, and a new replay or recovery is one.
- nvidia-resiliency-ext (NVLinkWindowHealthCheck in shared_utils/health_check.py) allows more replays and recoveries: a link is
  bad if it had some in more than half of the last 30 minutes. So new ones are a warning here.

The environment check sends only short copies over NVLinks, so its new errors are those of almost idle links. The fabric check
compares readings before and after its collectives (new_link_errors.py). Errors under the load of earlier jobs are in the sums:
there, a link is compared with the median of the GPU's links, which all count since the same reset. A link with 505 recoveries
failed days later, while the other links of 320 GPUs had no error (github.com/marin-community/marin/issues/9086).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from longhaul.artifacts.node_check_row import CheckRow, Result
from longhaul.checks.build_check_rows import Component
from longhaul.checks.nvidia_gpu_facts import CRC_ERRORS, GpuFacts

Counts = Mapping[int, int]
"""Number of an NVLink -> errors of one kind."""
_MAX_CRC_PER_S = 100
_TIMES_MEDIAN, _ALWAYS_ALLOWED = 10, 100
_NAMED_LINKS = 3
_SUM, _NEW = "NVLink errors since the driver was loaded", "NVLink errors during the check"
_SUM_EXPECTED = f"<= {_ALWAYS_ALLOWED} on a link, or <= {_TIMES_MEDIAN} times the median of the GPU's links"
_NEW_EXPECTED = f"no replay or recovery, < {_MAX_CRC_PER_S} CRC errors/s"
_REMEDY = (
    "let the admins test the NVLinks (dcgmi diag -r 3), and watch whether the numbers of nvidia-smi nvlink -e grow"
)


def nvlink_error_rows(component: Component, gpu: GpuFacts) -> Iterator[CheckRow]:
    """Yield the rows of one GPU."""
    if gpu.nvlink_errors is None:
        yield component.unknown(_SUM, gpu.unavailable.get("nvlink_errors", "NVML has no value"), _SUM_EXPECTED)
        return
    yield _row(component, _SUM, _SUM_EXPECTED, "warn", _links_that_stand_out(gpu.nvlink_errors))
    yield new_nvlink_errors_row(component, gpu)


def new_nvlink_errors_row(component: Component, gpu: GpuFacts) -> CheckRow:
    """Return the row of the errors since the earlier reading. The GPU must have counters."""
    if gpu.nvlink_errors_before is None or gpu.nvlink_errors is None:
        return component.unknown(_NEW, "there is no earlier reading", _NEW_EXPECTED)
    new = {kind: _growth(gpu.nvlink_errors_before.get(kind, {}), now) for kind, now in gpu.nvlink_errors.items()}
    resent = [f"{kind}: {_worst(counts)}" for kind, counts in new.items() if counts and kind not in CRC_ERRORS]
    damaged = _many_crc_errors(new, gpu.watched_s)
    return _row(component, _NEW, _NEW_EXPECTED, "fail" if damaged else "warn", damaged + resent)


def _row(component: Component, check: str, expected: str, result: Result, found: Sequence[str]) -> CheckRow:
    """Return the row of a check with these findings. One that is ok has no numbers, so that all GPUs share a row."""
    return component.row(check, "; ".join(found) or expected, expected, result if found else "ok", _REMEDY)


def _links_that_stand_out(errors: Mapping[str, Counts]) -> list[str]:
    found = []
    for kind, counts in errors.items():
        median = statistics.median(counts.values())
        limit = max(_ALWAYS_ALLOWED, _TIMES_MEDIAN * median)
        many = {link: count for link, count in counts.items() if count > limit}
        if many:
            found.append(f"{kind}: {_worst(many)}, median {median:g}")
    return found


def _many_crc_errors(new: Mapping[str, Counts], seconds: float) -> list[str]:
    found = []
    for kind in CRC_ERRORS:
        counts = new.get(kind, {})
        per_s = sum(counts.values()) / max(seconds, 1)  # no rate of a moment
        if per_s >= _MAX_CRC_PER_S:
            found.append(f"{kind}: {per_s:.0f}/s, {_worst(counts)}")
    return found


def _growth(before: Counts, now: Counts) -> Counts:
    """Return the links with new errors. A counter that somebody has reset has none."""
    return {link: count - before[link] for link, count in now.items() if link in before and count > before[link]}


def _worst(counts: Counts) -> str:
    """Return `12 on link 5, 9 on link 2, 7 on link 0 and fewer on 15 others`."""
    worst = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = len(worst) - _NAMED_LINKS
    text = ", ".join(f"{count} on link {link}" for link, count in worst[:_NAMED_LINKS])
    return text + (f" and fewer on {more} others" if more > 0 else "")
