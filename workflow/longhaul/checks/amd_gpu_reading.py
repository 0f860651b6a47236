"""Reads this node's AMD GPUs through amdsmi, and through files of the driver amdgpu what amdsmi does not give."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path

from longhaul.checks.amd_gpu_facts import AmdGpuFacts, AmdReading, Answers, Cause, reason_of
from longhaul.checks.amd_gpu_files import read_gpu_files
from longhaul.checks.amd_gpu_library import read_library
from longhaul.checks.pcie_links import PcieLink
from longhaul.checks.sysfs_files import SYS
from longhaul.runtime.call_with_deadline import call_within

_LIBRARY_S = 30.0
"""A GPU that hangs may keep a call into amdsmi for ever. 8 GPUs take about 2 s."""
_DRIVER_NOT_LOADED = 34
"""AMDSMI_STATUS_DRIVER_NOT_LOADED of amdsmi.h"""
_FILES = "files of the driver amdgpu"
_FACTS = [field.name for field in fields(AmdGpuFacts)]


def read_amd_gpus(addresses: Collection[str] = (), sys: Path = SYS) -> AmdReading:
    """Return the state of the GPUs with these PCI addresses; of all AMD GPUs if there is none of them.

    addresses: of the GPUs that the job may use, as torch states them. The driver shows the GPUs of other jobs, too.
    """
    files = read_gpu_files(sys)
    if not files:  # amdsmi needs the driver
        return AmdReading([])
    try:
        version, library = call_within(_LIBRARY_S, read_library)
    except ImportError:
        error, cause = "the package amdsmi is not installed", "not installed"
    except Exception as failed:  # amdsmi looks for libamd_smi.so in many ways, and for the driver
        error, cause = f"amdsmi: {reason_of(failed)}", _cause(failed)
    else:
        missing = Answers(unavailable=dict.fromkeys(_FACTS, "it does not show this GPU"))
        gpus = [_joined(address, answers, library.get(address, missing)) for address, answers in files.items()]
        return AmdReading(_chosen(gpus, addresses), " ".join(("amdsmi", version, "and", _FILES)))
    gpus = [_joined(*found, Answers()) for found in files.items()]
    return AmdReading(_chosen(gpus, addresses), _FILES, error, cause)


def _cause(error: Exception) -> Cause:
    if isinstance(error, TimeoutError):
        return "no answer"
    return "no driver" if getattr(error, "err_code", None) == _DRIVER_NOT_LOADED else "not installed"


def _joined(address: str, files: Answers, library: Answers) -> AmdGpuFacts:
    values = files.values | library.values
    reasons = files.unavailable | {fact: f"amdsmi: {reason}" for fact, reason in library.unavailable.items()}
    unavailable = {fact: reason for fact, reason in reasons.items() if fact not in values}
    return AmdGpuFacts(address, **values, unavailable=unavailable)


def _chosen(gpus: list[AmdGpuFacts], addresses: Collection[str]) -> list[AmdGpuFacts]:
    """Partitions of a GPU differ in the function, which is the last digit of the address."""
    devices = {address.rpartition(".")[0] for address in addresses}
    return [gpu for gpu in gpus if gpu.address.rpartition(".")[0] in devices] or gpus


def with_amd_links(links: list[PcieLink], gpus: list[AmdGpuFacts]) -> list[PcieLink]:
    """Return the links with amdsmi's values for AMD GPUs: the kernel's files may describe the switch inside such a GPU."""
    known = {gpu.address: gpu for gpu in gpus}
    return [_measured(link, known.get(link.address)) for link in links]


def _measured(link: PcieLink, gpu: AmdGpuFacts | None) -> PcieLink:
    if gpu is None or not (gpu.pcie_speed and gpu.pcie_speed_max and gpu.pcie_width and gpu.pcie_width_max):
        return link
    return replace(
        link, speed=gpu.pcie_speed, max_speed=gpu.pcie_speed_max, width=gpu.pcie_width, max_width=gpu.pcie_width_max
    )
