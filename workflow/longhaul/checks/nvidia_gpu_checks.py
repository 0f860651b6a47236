"""Decides which states of NVIDIA GPUs fail a node, and which only warn: ECC errors, slowdowns, clocks, NVLinks, PCIe links,
other processes, errors in the kernel log.

Meaning of the counters: docs.nvidia.com/deploy/nvml-api, docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from longhaul.artifacts.node_check_row import CheckRow, Result
from longhaul.checks.amd_gpu_facts import AmdGpuFacts
from longhaul.checks.build_check_rows import Component, FactCheck, fail_if, warn_if
from longhaul.checks.gpu_labels import gpu_name, short_address
from longhaul.checks.kernel_log import OPEN_LOG, KernelError, KernelLog, is_fatal
from longhaul.checks.nvidia_gpu_facts import GpuFacts, GpuReading
from longhaul.checks.nvlink_errors import nvlink_error_rows
from longhaul.checks.xid_errors import ROW_REMAPPED, xid_failure
from longhaul.config.gpu_datasheets import datasheet

WATCH = "watch whether the number grows"
_RESET = "drain the node and reset the GPU (nvidia-smi -r)"
_REPLACE = f"{_RESET}; if it happens again, the GPU must be replaced"
NOT_OF_JOB = "tell the admins; this job does not use the GPU"
_RESET_CLOCK = "let the admins reset it: nvidia-smi -rgc, and -rac"
_LEAST_CLOCK_SHARE = 0.8
_NO_KERNEL_ERRORS = "no Xid or SXid errors"
_MISMATCH = "mismatch"
"""Word in NVML's message about a library of another version than the kernel module: no program can then use the GPUs."""


def _on_off(is_on: bool) -> str:
    return "on" if is_on else "off"


def slowdown_result(found: list[str]) -> Result:
    if any(text.startswith("hardware") for text in found):
        return "fail"
    return "warn" if any("thermal" in text for text in found) else "ok"


_GPU_CHECKS = (
    FactCheck("ECC", "ecc_enabled", "on", warn_if(lambda on: not on), "switch it on: nvidia-smi -e 1, then reset the GPU",
              _on_off),
    FactCheck("uncorrectable ECC errors", "ecc_uncorrected", "0", fail_if(lambda count: count > 0), _REPLACE),
    FactCheck("uncorrectable ECC errors in the GPU's life", "ecc_uncorrected_ever", "0", warn_if(lambda count: count > 0),
              "compare the GPU with others when a training fails on this node"),
    FactCheck("corrected ECC errors", "ecc_corrected", "0", warn_if(lambda count: count > 0),
              WATCH),
    FactCheck("row remapping pending", "remapping_pending", "no", fail_if(bool), _RESET,
              lambda pending: "yes" if pending else "no"),
    FactCheck("row remapping failed", "remapping_failed", "no", fail_if(bool), "the GPU must be replaced",
              lambda failed: "yes" if failed else "no"),
    FactCheck("slowdown", "slowdowns", "none by heat or hardware", slowdown_result, "check the node's cooling and power supply",
              lambda found: ", ".join(found) or "none"),
    FactCheck("persistence mode", "persistence", "on", warn_if(lambda on: not on),
              "start nvidia-persistenced; without it, the driver loads again for each job", _on_off),
    FactCheck("MIG", "mig", "off", warn_if(bool), "switch it off (nvidia-smi -mig 0): a rank gets a slice of the GPU", _on_off),
    FactCheck("processes of other jobs", "processes", "none", fail_if(bool),
              "end them, or let Slurm give the whole node (exclusive: true in the site file)",
              lambda found: ", ".join(found) or "none"),
)  # fmt: skip


def nvidia_rows(
    readings: Mapping[str, GpuReading], gpus_per_node: int, min_nvlinks: int | None = None
) -> list[CheckRow]:
    """Return the rows of all GPUs of all nodes.

    readings:      node -> its GPUs
    gpus_per_node: how many the job needs
    min_nvlinks:   active NVLinks of each GPU by the site file; None: those of the datasheet and of the other GPUs
    """
    expected = _nvlinks_per_name(gpu for reading in readings.values() for gpu in reading.gpus)
    rows: list[CheckRow] = []
    for node, reading in readings.items():
        if reading.error:
            rows.append(_no_nvml_row(Component(node), reading))
        for index, reason in reading.lost.items():
            result, remedy = ("warn", NOT_OF_JOB) if _is_complete(reading, gpus_per_node) else ("fail", _REPLACE)
            rows.append(Component(node, f"GPU {index}").row("NVML", reason, "an answer", result, remedy))
        for gpu in reading.gpus:
            component = Component(node, gpu_name(gpu.index, gpu.pci_address))
            rows += component.judged(_GPU_CHECKS, gpu)
            rows += _power_rows(component, gpu)
            rows.append(clock_row(component, "SM clock", gpu, "sm_clock_mhz", _RESET_CLOCK))
            rows += _pcie_rows(component, gpu)
            links = expected[gpu.name] if min_nvlinks is None else min_nvlinks
            rows += _nvlink_rows(component, gpu, links)
            if links and gpu.nvlinks:
                rows += nvlink_error_rows(component, gpu)
    return rows


def _no_nvml_row(component: Component, reading: GpuReading) -> CheckRow:
    error = reading.error
    if reading.hangs:
        remedy = "a GPU may hang: drain the node, and restart it if nvidia-smi does not return either"
        return component.row("state of the GPUs", error, "NVML answers", "fail", remedy)
    if _MISMATCH in error.lower():
        remedy = "restart the node, so that library and kernel module of the driver have one version"
        return component.row("NVIDIA driver", error, "usable", "fail", remedy)
    remedy = "install nvidia-ml-py in the job environment, and make libnvidia-ml.so.1 visible in containers (--nv)"
    return component.unknown("state of the GPUs", error, "NVML answers", remedy)


def _power_rows(component: Component, gpu: GpuFacts) -> Iterator[CheckRow]:
    limit, default = gpu.power_limit_w, gpu.power_limit_default_w
    if limit is None or default is None:
        reasons = gpu.unavailable
        yield component.unknown(
            "power limit", reasons.get("power_limit_w") or reasons["power_limit_default_w"], "default"
        )
        return
    result: Result = "warn" if limit < default else "ok"
    yield component.row("power limit", f"{limit:.0f} W", f"{default:.0f} W", result, "raise it: nvidia-smi -pl")


def clock_row(component: Component, check: str, gpu: GpuFacts | AmdGpuFacts, clock: str, remedy: str) -> CheckRow:
    """Classify the clock under load. Where nothing slows a GPU down, a low clock was set by hand (nvidia-smi -lgc or -ac).

    clock: name of the fact; that of the maximum has `_max` before the unit
    """
    facts = (clock, clock.replace("_mhz", "_max_mhz"), "slowdowns")
    now, maximum, slowdowns = (getattr(gpu, fact) for fact in facts)
    expected = f">= {_LEAST_CLOCK_SHARE:.0%} of the maximum"
    if now is None or maximum is None or slowdowns is None:
        reason = next((gpu.unavailable[fact] for fact in facts if fact in gpu.unavailable), "no value")
        return component.unknown(check, reason, expected)
    if not gpu.is_loaded:
        return component.unknown(check, f"the GPU is idle, at {now} MHz", expected)
    is_low = now < _LEAST_CLOCK_SHARE * maximum and not slowdowns
    value, expected = f"{now} MHz", f"{expected}, {maximum} MHz"
    return component.row(check, value, expected, "warn" if is_low else "ok", remedy)


def _pcie_rows(component: Component, gpu: GpuFacts) -> Iterator[CheckRow]:
    """Classify width and generation of the PCIe link. An idle GPU lowers the generation, but never the width."""
    remedy = "let the admins reseat the GPU or its riser, and look for PCIe errors in the kernel log"
    if gpu.pcie_width is None or gpu.pcie_width_max is None:
        yield component.unknown("PCIe width", gpu.unavailable.get("pcie_width", "NVML has no value"), "maximum")
    else:
        result: Result = "fail" if gpu.pcie_width < gpu.pcie_width_max else "ok"
        yield component.row("PCIe width", f"x{gpu.pcie_width}", f"x{gpu.pcie_width_max}", result, remedy)
    now, maximum = gpu.pcie_generation, gpu.pcie_generation_max
    if now is None or maximum is None:
        yield component.unknown(
            "PCIe generation", gpu.unavailable.get("pcie_generation", "NVML has no value"), "maximum"
        )
    elif now < maximum and not gpu.is_loaded:
        yield component.unknown(
            "PCIe generation", f"the GPU is idle, and the link is at generation {now}", str(maximum)
        )
    else:
        yield component.row("PCIe generation", str(now), str(maximum), "fail" if now < maximum else "ok", remedy)


def _nvlinks_per_name(gpus: Iterable[GpuFacts]) -> dict[str, int]:
    """Return name -> the largest number of active NVLinks of a GPU of this name, or that of its datasheet if it is larger."""
    found: dict[str, int] = {}
    for gpu in gpus:
        sheet = datasheet(gpu.name)
        found.setdefault(gpu.name, (sheet.nvlinks if sheet else None) or 0)
        found[gpu.name] = max(found[gpu.name], gpu.nvlinks or 0)
    return found


def _nvlink_rows(component: Component, gpu: GpuFacts, expected: int) -> Iterator[CheckRow]:
    if gpu.nvlinks is None:
        if expected:
            yield component.unknown(
                "NVLinks", gpu.unavailable.get("nvlinks", "NVML has no value"), f"{expected} active"
            )
        return
    is_short = gpu.nvlinks < expected
    value = f"{gpu.nvlinks} active" + (f", not active: {', '.join(map(str, gpu.nvlinks_down))}" if is_short else "")
    remedy = "let the admins check the NVLinks and the NVSwitches (nvidia-smi nvlink -s, fabric manager's log)"
    yield component.row("NVLinks", value, f"{expected} active", "fail" if is_short else "ok", remedy)


def kernel_log_rows(node: str, log: KernelLog, reading: GpuReading, gpus_per_node: int) -> list[CheckRow]:
    """Return a row per Xid and SXid error of a node, or one row if there is none.

    reading:       the GPUs of the job
    gpus_per_node: how many the job needs
    """
    if log.unreadable:
        return [Component(node).unknown("kernel log", log.unreadable, _NO_KERNEL_ERRORS, OPEN_LOG)]
    if not log.errors:
        return [Component(node).row("kernel log", _NO_KERNEL_ERRORS, _NO_KERNEL_ERRORS)]
    is_complete = _is_complete(reading, gpus_per_node)
    return [_kernel_error_row(node, error, reading.gpus, is_complete) for error in log.errors]


def _kernel_error_row(node: str, error: KernelError, gpus: Sequence[GpuFacts], is_complete: bool) -> CheckRow:
    address = short_address(error.device)
    gpu = next((gpu for gpu in gpus if short_address(gpu.pci_address) == address), None)
    component = Component(node, gpu_name(gpu.index, gpu.pci_address) if gpu else f"PCI {address}")
    meaning = xid_failure(error.number, error.text) if error.kind == "Xid" else ""
    value = (
        ", ".join(filter(None, (f"{error.kind} {error.number}", f"{error.count} times", meaning))) + f": {error.text}"
    )
    if error.kind == "Xid" and gpu is None and is_complete:
        return component.row("kernel log", value, _NO_KERNEL_ERRORS, "warn", NOT_OF_JOB)
    is_remapped = error.number == ROW_REMAPPED and gpu is not None and gpu.remapping_pending is False
    failed = (bool(meaning) and not is_remapped) or (error.kind == "SXid" and is_fatal(error.text))
    remedy = f"{_REPLACE}; the entry goes with a restart of the node" if failed else "watch whether it happens again"
    return component.row("kernel log", value, _NO_KERNEL_ERRORS, "fail" if failed else "warn", remedy)


def _is_complete(reading: GpuReading, gpus_per_node: int) -> bool:
    """Return whether all GPUs that the job needs are known, so that any other GPU is none of the job's."""
    return len(reading.gpus) >= gpus_per_node
