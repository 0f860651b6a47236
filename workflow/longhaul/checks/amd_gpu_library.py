"""Reads AMD GPUs through amdsmi, ROCm's library of amd-smi: errors, bad pages, power limit, slowdowns, clock, processes, links.

Interface: rocm.docs.amd.com/projects/amdsmi, Python API, ROCm 6.3 to 7.2. It gives "N/A" for what a GPU does not have; older
versions give the largest integer. amdsmi_gpu_xgmi_error_status is not called: the driver resets that status when it is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from typing import Any

from longhaul.checks.amd_gpu_facts import PENDING, RESERVED, UNRESERVED, Answers

MIB = 2**20
_MICROWATT = 1e-6
_PAGE_FLAGS = {"RESERVED": RESERVED, "PENDING": PENDING, "UNRESERVABLE": UNRESERVED}
_NO_BLOCKS = ("INVALID", "RESERVED")
_SLOWDOWNS = {
    "active_ppt_pwr": "power limit",
    "active_prochot_thrm": "hardware slowdown (PROCHOT)",
    "active_socket_thrm": "thermal slowdown by the socket",
    "active_hbm_thrm": "thermal slowdown by the memory",
    "active_vr_thrm": "thermal slowdown by the voltage regulator",
}
"""Fields of amdsmi_get_violation_status, of MI300 and later GPUs."""
_LARGEST = (2**32 - 1, 2**64 - 1)
_XGMI = 2
"""AMDSMI_LINK_TYPE_XGMI of amdsmi.h"""


def read_library() -> tuple[str, dict[str, Answers]]:
    """Return amdsmi's version, and PCI address -> its answers, of the GPUs that this process may use.

    Raises:
        Exception: amdsmi cannot be imported, as it searches libamd_smi.so in many ways, or it finds no driver.
    """
    import amdsmi  # pyright: ignore[reportMissingImports]

    amdsmi.amdsmi_init()
    try:
        handles = {amdsmi.amdsmi_get_gpu_device_bdf(gpu): gpu for gpu in amdsmi.amdsmi_get_processor_handles()}
        answers = {address: Answers() for address in handles}
        for ask in (
            _ask_clock,
            _ask_state,
        ):  # clocks first: the load ends soon, and a slowdown takes amdsmi 0.1 s per GPU
            for address, handle in handles.items():
                ask(amdsmi, handle, answers[address])
        for address, paths in _paths(amdsmi, handles).items():
            answers[address].values["paths"] = paths
    finally:
        amdsmi.amdsmi_shut_down()
    return str(getattr(amdsmi, "__version__", "")), answers


def _ask_clock(amdsmi: Any, gpu: Any, answers: Answers) -> None:
    answers.ask(("activity",), lambda: (_number(amdsmi.amdsmi_get_gpu_activity(gpu)["gfx_activity"]),))
    answers.ask(
        ("gfx_clock_mhz", "gfx_clock_max_mhz"),
        lambda: _numbers(amdsmi.amdsmi_get_clock_info(gpu, amdsmi.AmdSmiClkType.GFX), "clk", "max_clk"),
    )


def _ask_state(amdsmi: Any, gpu: Any, answers: Answers) -> None:
    answers.ask(("slowdowns",), lambda: (_slowdowns(amdsmi.amdsmi_get_violation_status(gpu)),))
    answers.ask(("uncorrected", "corrected", "deferred"), lambda: _error_counts(amdsmi, gpu))
    answers.ask(("bad_pages",), lambda: (_bad_pages(amdsmi, gpu),))
    answers.ask(
        ("power_limit_w", "power_limit_default_w"), lambda: _power_limits(amdsmi.amdsmi_get_power_cap_info(gpu))
    )
    answers.ask(("processes",), lambda: (_processes(amdsmi.amdsmi_get_gpu_process_list(gpu)),))
    answers.ask(
        ("xgmi_links", "xgmi_links_down"), lambda: _xgmi_links(amdsmi.amdsmi_get_gpu_xgmi_link_status(gpu)["status"])
    )
    answers.ask(
        ("pcie_speed", "pcie_speed_max", "pcie_width", "pcie_width_max"),
        lambda: _pcie_link(amdsmi.amdsmi_get_pcie_info(gpu)),
    )


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and value not in _LARGEST else None


def _numbers(answer: Mapping[str, Any], *names: str) -> list[int | None]:
    return [_number(answer[name]) for name in names]


def _slowdowns(status: Mapping[str, Any]) -> list[str] | None:
    known = {text: status[name] for name, text in _SLOWDOWNS.items() if isinstance(status[name], bool)}
    return [text for text, is_active in known.items() if is_active] if known else None


def _error_counts(amdsmi: Any, gpu: Any) -> list[dict[str, int] | None]:
    """Return block -> count, of the blocks that have some: uncorrectable, correctable and deferred errors.

    None: no block has a number.
    """
    answers: dict[str, Mapping[str, Any]] = {}
    for block in amdsmi.AmdSmiGpuBlock:
        if block.name not in _NO_BLOCKS:
            with suppress(amdsmi.AmdSmiLibraryException):  # a block without counters
                answers[block.name.lower()] = amdsmi.amdsmi_get_gpu_ecc_count(gpu, block)
    answers = answers or {"all blocks": amdsmi.amdsmi_get_gpu_total_ecc_count(gpu)}
    kinds = ("uncorrectable_count", "correctable_count", "deferred_count")
    return [_known_counts({block: _number(answer[kind]) for block, answer in answers.items()}) for kind in kinds]


def _known_counts(counts: Mapping[str, int | None]) -> dict[str, int] | None:
    is_known = any(count is not None for count in counts.values())
    return {block: count for block, count in counts.items() if count} if is_known else None


def _bad_pages(amdsmi: Any, gpu: Any) -> dict[str, int] | None:
    """Return flag -> number of pages. amdsmi of ROCm 5 gives a text instead of an empty list."""
    pages = amdsmi.amdsmi_get_gpu_bad_page_info(gpu)
    if not isinstance(pages, list):
        return None
    return dict(Counter(_PAGE_FLAGS[amdsmi.AmdSmiMemoryPageStatus(page["status"]).name] for page in pages))


def _power_limits(answer: Mapping[str, Any]) -> list[float | None]:
    limits = _numbers(answer, "power_cap", "default_power_cap")
    return [None if limit is None else limit * _MICROWATT for limit in limits]


def _processes(found: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Return the processes that have memory of the GPU: ROCm's runtime opens all GPUs of a node, also those it may not use."""
    used = {process["pid"]: (process["name"], process["memory_usage"]["vram_mem"]) for process in found}
    return {pid: f"process {pid} ({name}, {used_b / MIB:.0f} MiB)" for pid, (name, used_b) in used.items() if used_b}


def _xgmi_links(states: Sequence[str]) -> tuple[int | None, list[int]]:
    """Return how many links are up, and the numbers of those that are down. X: switched off, or the GPU itself."""
    up, down = states.count("U"), [number for number, state in enumerate(states) if state == "D"]
    return (up if up or down else None), down


def _paths(amdsmi: Any, handles: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return address -> address of another GPU -> what connects them. Pairs that amdsmi does not answer for are absent."""
    found: dict[str, dict[str, str]] = {address: {} for address in handles}
    for one, other in combinations(handles, 2):
        with suppress(Exception):  # as in Answers.ask: GPUs, drivers and versions of ROCm differ in what they answer
            path = _path(amdsmi, handles[one], handles[other])
            found[one][other] = found[other][one] = path
    return found


def _path(amdsmi: Any, gpu: Any, other: Any) -> str:
    """Return the path with the rate of its links: two dies of MI250X have 4, 2 or 1 of them, or a third die between them.

    The rate tells, and not the hops: on Frontier amdsmi states one hop between any two dies (github.com/ROCm/rocm-systems, 5763).
    """
    if amdsmi.amdsmi_topo_get_link_type(gpu, other)["type"] != _XGMI:
        return "PCIe"
    mb_per_s = 0
    with suppress(amdsmi.AmdSmiLibraryException):  # no direct link
        mb_per_s = _number(amdsmi.amdsmi_get_minmax_bandwidth_between_processors(gpu, other)["max_bandwidth"]) or 0
    return f"XGMI {mb_per_s / 1000:g} GB/s" if mb_per_s else "XGMI over other GPUs"


def _pcie_link(answer: Mapping[str, Any]) -> list[float | None]:
    """Return the speed, its maximum, the width and its maximum. amdsmi states MT/s, and 0 for a link that is none of PCIe."""
    now, most = answer["pcie_metric"], answer["pcie_static"]
    speeds = [_number(now["pcie_speed"]), _number(most["max_pcie_speed"])]
    widths = [_number(now["pcie_width"]), _number(most["max_pcie_width"])]
    return [speed / 1000 if speed else None for speed in speeds] + [width or None for width in widths]
