"""Decides which states of AMD GPUs fail a node, and which only warn: errors, bad pages, power, slowdowns, clocks, XGMI links."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from longhaul.artifacts.node_check_row import CheckRow, Result
from longhaul.checks.amd_gpu_facts import PENDING, RESERVED, UNRESERVED, AmdGpuFacts, AmdReading, Cause
from longhaul.checks.amd_kernel_log import FAILED_RESET, AmdKernelError, is_of
from longhaul.checks.build_check_rows import Component, FactCheck, fail_if, warn_if
from longhaul.checks.kernel_log import OPEN_LOG, KernelLog
from longhaul.checks.nvidia_gpu_checks import NOT_OF_JOB, WATCH, clock_row, slowdown_result

_STATE, _NO_STATE = "source of the GPUs' state", "slowdowns, clocks, processes and XGMI links"
_RESET = (
    "drain the node and reset the GPU (amd-smi reset --gpureset, or rocm-smi --gpureset); if it happens again, the "
    "GPU must be replaced"
)
_RESET_POWER = (
    "let the admins reset it (amd-smi reset --power-cap, or rocm-smi --resetpoweroverdrive), unless the site saves power on "
    "purpose"
)
_RESET_CLOCK = "let the admins reset it: amd-smi reset --clocks, or rocm-smi --resetclocks"
_REMEDIES: dict[Cause, str] = {
    "not installed": "install the amdsmi of the node's ROCm in the job environment: pip install /opt/rocm/share/amd_smi",
    "no driver": "make /sys/module/amdgpu, /dev/kfd and /dev/dri of the node visible in the container, or let the admins load "
    "the driver amdgpu",
    "no answer": "a GPU may hang: run amd-smi or rocm-smi on the node, and drain it if that does not return either",
}
_NO_KERNEL_ERRORS = "no hardware errors and no resets of GPUs"
_RESTART = "drain the node and restart it; if it happens again, the GPU must be replaced"
_WATCH_RESETS = (
    "watch whether it happens again: a program can cause a reset, too; the entry goes with a restart of the node"
)
_PAGES = {RESERVED: "out of use", PENDING: "pending", UNRESERVED: "still in use"}


def _block_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {block}" for block, count in counts.items()) or "0"


_UNCORRECTED = FactCheck("uncorrectable ECC errors", "uncorrected", "0", fail_if(bool), _RESET, _block_text)
_ERRORS = (
    _UNCORRECTED,
    FactCheck("corrected ECC errors", "corrected", "0", warn_if(bool), WATCH, _block_text),
    FactCheck("deferred ECC errors", "deferred", "0", warn_if(bool), WATCH, _block_text),
)
_LIBRARY_CHECKS = (
    FactCheck("slowdown", "slowdowns", "none by heat or hardware", slowdown_result, "check the node's cooling and power supply",
              lambda found: ", ".join(found) or "none"),
    # Nobody has seen yet what amdsmi lists on a shared node, so this is no failure as it is on NVIDIA GPUs.
    FactCheck("processes of other jobs", "processes", "none", warn_if(bool),
              "end them, or let Slurm give the whole node (exclusive: true in the site file)",
              lambda found: ", ".join(found.values()) or "none"),
)  # fmt: skip


def amd_rows(readings: Mapping[str, AmdReading], gpus_per_node: int) -> list[CheckRow]:
    """Return the rows of all AMD GPUs.

    readings:      node -> its GPUs
    gpus_per_node: how many the job needs
    """
    links = [gpu.xgmi_links or 0 for reading in readings.values() for gpu in reading.gpus]
    usual = max(links, default=0) if gpus_per_node > 1 else 0  # a GPU alone sends nothing over XGMI links
    return [row for node, reading in readings.items() for row in _rows_of_node(Component(node), reading, usual)]


def _rows_of_node(node: Component, reading: AmdReading, usual_links: int) -> Iterator[CheckRow]:
    """Yield the rows of one node. usual_links: largest number of XGMI links that are up, of a GPU of any node."""
    if not reading.gpus:
        reason = "the driver amdgpu has no GPU in /sys/bus/pci"
        yield node.unknown("state of the GPUs", reason, "one entry per GPU", "make /sys visible in the container")
        return
    yield node.row(_STATE, reading.source, "amdsmi, and what it does not give by the driver amdgpu")
    if reading.error:
        result: Result = "warn" if reading.cause == "no answer" else "unknown"
        value, remedy = f"not available: {reading.error}", _REMEDIES[reading.cause]
        yield node.row(_NO_STATE, value, "amdsmi answers", result, remedy)
    for gpu in reading.gpus:
        component = Component(node.node, f"GPU {gpu.address}")
        counts = (gpu.uncorrected, gpu.corrected, gpu.deferred, gpu.bad_pages)
        has_counters = any(count is not None for count in counts)  # consumer cards have none
        yield from component.judged(_ERRORS if has_counters else (_UNCORRECTED,), gpu)
        if has_counters:
            yield _page_row(component, gpu)
        yield from _power_rows(component, gpu)
        if not reading.error:
            yield from component.judged(_LIBRARY_CHECKS, gpu)
            yield clock_row(component, "clock of the shaders", gpu, "gfx_clock_mhz", _RESET_CLOCK)
            yield _xgmi_row(component, gpu, usual_links)


def _page_row(component: Component, gpu: AmdGpuFacts) -> CheckRow:
    check, pages = "bad pages of the memory", gpu.bad_pages
    if pages is None:
        return component.unknown(check, gpu.unavailable.get("bad_pages", "no value"), "0")
    is_bad = PENDING in pages or UNRESERVED in pages
    result: Result = "fail" if is_bad else "warn" if pages else "ok"
    value = ", ".join(f"{pages[flag]} {text}" for flag, text in _PAGES.items() if flag in pages) or "0"
    return component.row(check, value, "0", result, _RESET if is_bad else WATCH)


def _power_rows(component: Component, gpu: AmdGpuFacts) -> Iterator[CheckRow]:
    limit, default = gpu.power_limit_w, gpu.power_limit_default_w
    if limit is None or default is None:
        reasons = gpu.unavailable
        reason = reasons.get("power_limit_w") or reasons.get("power_limit_default_w", "no value")
        yield component.unknown("power limit", reason, "default")
    elif limit:
        result: Result = "warn" if limit < default else "ok"
        yield component.row("power limit", f"{limit:.0f} W", f"{default:.0f} W", result, _RESET_POWER)


def _xgmi_row(component: Component, gpu: AmdGpuFacts, usual: int) -> CheckRow:
    """Classify the links to other GPUs. A board may have ports without a link, so a GPU is compared with the others."""
    if gpu.xgmi_links is None:
        return component.unknown(
            "XGMI links", gpu.unavailable.get("xgmi_links", "no value"), "as many as other GPUs have"
        )
    is_short = gpu.xgmi_links < usual
    down = ", ".join(map(str, gpu.xgmi_links_down or ()))
    value = f"{gpu.xgmi_links} active" + (f", not active: {down}" if is_short and down else "")
    remedy = "drain the node, and let the admins check the links between the GPUs (amd-smi xgmi)"
    return component.row("XGMI links", value, f"{usual} active", "fail" if is_short else "ok", remedy)


def amd_kernel_log_rows(node: str, log: KernelLog, reading: AmdReading, gpus_per_node: int) -> Iterator[CheckRow]:
    """Yield a row per kind of event of a GPU, or one row if there is none.

    reading:       the GPUs of the job, as far as torch can use them
    gpus_per_node: how many the job needs
    """
    if log.unreadable:
        yield Component(node).unknown("kernel log", log.unreadable, _NO_KERNEL_ERRORS, OPEN_LOG)
    elif not log.amd_errors:
        yield Component(node).row("kernel log", _NO_KERNEL_ERRORS, _NO_KERNEL_ERRORS)
    lacks_gpus = len(reading.gpus) < gpus_per_node  # torch does not show a GPU that a failed reset left behind
    for error in log.amd_errors:
        is_of_job = lacks_gpus or is_of(error, [gpu.address for gpu in reading.gpus])
        yield _kernel_error_row(Component(node, f"GPU {error.address}"), error, is_of_job)


def _kernel_error_row(component: Component, error: AmdKernelError, is_of_job: bool) -> CheckRow:
    result: Result = "fail" if is_of_job and error.event == FAILED_RESET else "warn"
    remedy = NOT_OF_JOB if not is_of_job else _RESTART if result == "fail" else _WATCH_RESETS
    often = f", {error.count} times" if error.count > 1 else ""
    value = f"{error.event}{often}: {error.text}"
    return component.row("kernel log", value, _NO_KERNEL_ERRORS, result, remedy)
