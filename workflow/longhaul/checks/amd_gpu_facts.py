"""States what a node knows about its AMD GPUs: errors, bad pages, power limit, slowdowns, clock, processes, links."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

RESERVED, PENDING, UNRESERVED = "R", "P", "F"
"""Flags of a bad page: out of use, out of use after the next reset, and still in use because it cannot be reserved."""
_LOADED_PERCENT = 90
Cause = Literal["not installed", "no driver", "no answer"]
"""Why amdsmi gives nothing: package or library are missing or do not fit, it finds no driver, or a call does not return."""


@dataclass(frozen=True)
class AmdGpuFacts:
    """One GPU; None where nothing states a value, and `unavailable` then holds the reason.

    address:        PCI address as sysfs writes it
    uncorrected:    errors since the driver was loaded: block -> count, of the blocks that have some; umc is the memory
    deferred:       the same, of errors in data that nothing has used yet
    bad_pages:      flag -> number of memory pages, over the GPU's life
    power_limit_w:  0 where another die of the card has the limit of both
    activity:       per cent of the time that the GPU was at work when its clock was read
    processes:      process ID -> text, of the processes that have memory of the GPU
    xgmi_links:     number of XGMI links that are up; xgmi_links_down has the numbers of those that are down
    paths:          address of another GPU of the node -> XGMI with the rate of its links, or PCIe
    pcie_speed:     GT/s per lane
    """

    address: str
    uncorrected: Mapping[str, int] | None = None
    corrected: Mapping[str, int] | None = None
    deferred: Mapping[str, int] | None = None
    bad_pages: Mapping[str, int] | None = None
    power_limit_w: float | None = None
    power_limit_default_w: float | None = None
    slowdowns: list[str] | None = None
    activity: int | None = None
    gfx_clock_mhz: int | None = None
    gfx_clock_max_mhz: int | None = None
    processes: Mapping[int, str] | None = None
    xgmi_links: int | None = None
    xgmi_links_down: list[int] | None = None
    paths: Mapping[str, str] = field(default_factory=dict)
    pcie_speed: float | None = None
    pcie_speed_max: float | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    unavailable: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_loaded(self) -> bool:
        """Return whether the GPU was at work, so that its clock is at full speed."""
        return (self.activity or 0) >= _LOADED_PERCENT


@dataclass(frozen=True)
class AmdReading:
    """AMD GPUs of this node, in the order of their PCI addresses.

    source: what the facts are from
    error:  why amdsmi was not used; "" where it was
    cause:  of this error
    """

    gpus: list[AmdGpuFacts]
    source: str = ""
    error: str = ""
    cause: Cause = "not installed"


@dataclass
class Answers:
    """Facts about one GPU by one source, and why it has no others."""

    values: dict[str, Any] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def ask(self, facts: Sequence[str], answer: Callable[[], Sequence[Any]]) -> None:
        """Keep what a function of the source answers, one value per fact. None: the source knows the fact, but has no value."""
        try:
            values = answer()
        except Exception as error:  # GPUs, drivers and versions of ROCm differ in what they answer
            self.unavailable |= dict.fromkeys(facts, reason_of(error))
            return
        for fact, value in zip(facts, values, strict=True):
            if value is None:
                self.unavailable[fact] = "no value"
            else:
                self.values[fact] = value


def reason_of(error: Exception) -> str:
    """Return an error in one line. AmdSmiLibraryException has its words in `err_info`; its text begins with a line break."""
    return " ".join(str(getattr(error, "err_info", "") or error or type(error).__name__).split())


def with_earlier_processes(earlier: AmdReading, now: AmdReading) -> AmdReading:
    """Return `now` with those processes alone that an earlier reading had, too: not this process, which has opened the GPUs."""
    before = {gpu.address: gpu.processes for gpu in earlier.gpus}
    return replace(now, gpus=[_with_processes_of(before.get(gpu.address), gpu) for gpu in now.gpus])


def _with_processes_of(before: Mapping[int, str] | None, gpu: AmdGpuFacts) -> AmdGpuFacts:
    if before is None or gpu.processes is None:
        return replace(gpu, processes=None)
    return replace(gpu, processes={number: text for number, text in gpu.processes.items() if number in before})
