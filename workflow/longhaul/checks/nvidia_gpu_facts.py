"""Reads the state of each NVIDIA GPU through NVML: ECC errors, slowdowns, NVLinks, PCIe link, power limit, processes.

NVML is the library of nvidia-smi, and pynvml (package nvidia-ml-py) is NVIDIA's interface to it. A value that a GPU does not
have is None, and `unavailable` holds NVML's reason.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from longhaul.runtime.call_with_deadline import call_within

MIB = 2**20
_NVML_S = 30.0
"""A GPU that hangs may keep a call into NVML for ever. 8 GPUs take less than a second."""
SLOWDOWNS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
"""Bits of nvmlClocksEventReasons (nvml.h) that lower the clocks of a GPU at work."""
PATHS = {0: "one board", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
"""nvmlGpuTopologyLevel_t (nvml.h) -> the word of `nvidia-smi topo -m` for the path over PCIe between two GPUs."""
NVLINK_PATH = "NVLink"
NVLINK_ERRORS = {0: "replays", 1: "recoveries", 2: "CRC errors of flits", 3: "CRC errors of data"}
"""nvmlNvLinkErrorCounter_t (nvml.h) -> the kind of error, as in `nvidia-smi nvlink -e`. A sender sends again (replay), or trains
the link again (recovery); a receiver finds a wrong checksum in flow control or in data. NVML's sums of all links of a GPU,
NVML_FI_DEV_NVLINK_*_ERROR_COUNT_TOTAL, stay 0 on Hopper (github.com/DataDog/datadog-agent/pull/55966). The counter of ECC errors
(4) is not read: no source says how many a healthy link has."""
CRC_ERRORS = (NVLINK_ERRORS[2], NVLINK_ERRORS[3])


@dataclass(frozen=True)
class GpuFacts:
    """State of one GPU. Counts of errors are since the driver was loaded, those of `_ever` since the GPU was made.

    is_loaded:     the GPU was at work just before, so its clocks and its PCIe link are at full speed
    nvlinks:       number of active NVLinks
    nvlinks_down:  numbers of the NVLinks that are not active
    nvlink_errors: kind of NVLINK_ERRORS -> number of an NVLink -> errors
    paths:         UUID of another GPU of the node -> NVLINK_PATH, else a word of PATHS; `NVLink x2` for two direct links

    nvlink_errors_before: the same in an earlier reading, `watched_s` seconds before
    """

    index: int
    name: str
    uuid: str
    pci_address: str
    is_loaded: bool
    ecc_enabled: bool | None
    ecc_uncorrected: int | None
    ecc_corrected: int | None
    ecc_uncorrected_ever: int | None
    remapping_pending: bool | None
    remapping_failed: bool | None
    slowdowns: list[str] | None
    sm_clock_mhz: int | None
    sm_clock_max_mhz: int | None
    power_limit_w: float | None
    power_limit_default_w: float | None
    persistence: bool | None
    mig: bool | None
    processes: list[str] | None
    nvlinks: int | None
    nvlinks_down: list[int]
    nvlink_errors: dict[str, dict[int, int]] | None
    pcie_generation: int | None
    pcie_generation_max: int | None
    pcie_width: int | None
    pcie_width_max: int | None
    nvlink_errors_before: dict[str, dict[int, int]] | None = None
    watched_s: float = 0.0
    paths: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GpuReading:
    """GPUs of this node.

    error: why NVML cannot be used; `gpus` is empty then
    hangs: it does not answer
    lost:  index of a GPU that does not answer -> NVML's reason
    at_s:  time of the reading by the node's monotonic clock
    """

    gpus: list[GpuFacts]
    error: str = ""
    lost: dict[int, str] = field(default_factory=dict)
    at_s: float = 0.0
    hangs: bool = False


def read_gpus(uuids: Collection[str] = (), is_loaded: bool = False) -> GpuReading:
    """Return the state of the GPUs with these UUIDs; without UUIDs, of all GPUs that NVML shows.

    uuids: UUIDs of the GPUs that the job may use. NVML also shows the GPUs of other jobs, where Slurm does not hide them.
    """
    try:
        return call_within(_NVML_S, lambda: _read_gpus(uuids, is_loaded))
    except TimeoutError as error:
        return GpuReading([], f"NVML: {error}", hangs=True)


def _read_gpus(uuids: Collection[str], is_loaded: bool) -> GpuReading:
    try:
        import pynvml
    except ImportError:
        return GpuReading([], "the package nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuReading([], f"NVML: {error}")
    try:
        return chosen_gpus(_read_all(pynvml, is_loaded), uuids)
    except pynvml.NVMLError as error:
        return GpuReading([], f"NVML: {error}")
    finally:
        pynvml.nvmlShutdown()


def _read_all(pynvml: Any, is_loaded: bool) -> GpuReading:
    found, lost, at_s = [], {}, time.monotonic()
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            found.append(_gpu_facts(pynvml, index, pynvml.nvmlDeviceGetHandleByIndex(index), is_loaded))
        except pynvml.NVMLError as error:
            lost[index] = str(error)
    return GpuReading([replace(gpu, paths=_paths(pynvml, gpu, found)) for gpu in found], lost=lost, at_s=at_s)


def _paths(pynvml: Any, gpu: GpuFacts, gpus: Iterable[GpuFacts]) -> dict[str, str]:
    """Return the paths to the other GPUs of the node, as far as NVML knows them: virtual machines hide them."""
    paths, links = {}, _direct_nvlinks(pynvml, gpu)
    for other in gpus:
        with suppress(pynvml.NVMLError):
            if other.uuid != gpu.uuid:
                own, others = (pynvml.nvmlDeviceGetHandleByIndex(one.index) for one in (gpu, other))
                paths[other.uuid] = _path(pynvml, own, others, links[other.pci_address])
    return paths


def _direct_nvlinks(pynvml: Any, gpu: GpuFacts) -> Counter[str]:
    """Return PCI address -> number of NVLinks to it. With NVSwitches, all links of a GPU lead to switches."""
    found: Counter[str] = Counter()
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS if gpu.nvlinks else 0):
        with suppress(pynvml.NVMLError):
            handle = pynvml.nvmlDeviceGetHandleByIndex(gpu.index)
            found[_bus_id(pynvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link))] += 1
    return found


def _path(pynvml: Any, gpu: Any, other: Any, links: int) -> str:
    """Return the path that copies take, as `nvidia-smi topo -m` shows it: NVLink where it connects the GPUs.

    links: NVLinks between the two GPUs. On V100 servers without NVSwitches, some GPUs have two and others one or none.
    """
    with suppress(pynvml.NVMLError):
        if pynvml.nvmlDeviceGetP2PStatus(gpu, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK) == pynvml.NVML_P2P_STATUS_OK:
            return f"{NVLINK_PATH} x{links}" if links else NVLINK_PATH
    level = pynvml.nvmlDeviceGetTopologyCommonAncestor(gpu, other)
    return PATHS.get(level, f"level {level}")


def chosen_gpus(reading: GpuReading, uuids: Collection[str]) -> GpuReading:
    """Return the reading of the GPUs with these UUIDs; of all GPUs if none has one of them.

    torch writes a UUID without NVML's `GPU-`.
    """
    words = {uuid.removeprefix("GPU-") for uuid in uuids}
    return replace(
        reading, gpus=[gpu for gpu in reading.gpus if gpu.uuid.removeprefix("GPU-") in words] or reading.gpus
    )


def with_processes_left(earlier: GpuReading, now: GpuReading) -> GpuReading:
    """Return `now` with those processes alone that an earlier reading had, too: not this process, which has opened the GPUs."""
    before = {gpu.uuid: {_process_number(text) for text in gpu.processes or ()} for gpu in earlier.gpus}
    return replace(now, gpus=[_with_processes(gpu, before.get(gpu.uuid, set())) for gpu in now.gpus])


def _with_processes(gpu: GpuFacts, kept: Collection[str]) -> GpuFacts:
    if gpu.processes is None:
        return gpu
    return replace(gpu, processes=[text for text in gpu.processes if _process_number(text) in kept])


def _process_number(text: str) -> str:
    """Return `process 7` of a text of _process_text; the memory in it changes while the process ends."""
    return text.partition(" (")[0]


def with_processes_of(earlier: GpuReading, now: GpuReading) -> GpuReading:
    """Return `now` with the processes of an earlier reading, when this process did not use the GPUs yet."""
    processes = {gpu.uuid: gpu.processes for gpu in earlier.gpus}
    return replace(now, gpus=[replace(gpu, processes=processes.get(gpu.uuid)) for gpu in now.gpus])


def with_earlier_nvlink_errors(earlier: GpuReading, now: GpuReading) -> GpuReading:
    """Return `now` with the NVLinks' errors of an earlier reading, to tell new errors from old ones."""
    before, watched_s = {gpu.uuid: gpu.nvlink_errors for gpu in earlier.gpus}, now.at_s - earlier.at_s
    return replace(
        now,
        gpus=[replace(gpu, nvlink_errors_before=before.get(gpu.uuid), watched_s=watched_s) for gpu in now.gpus],
    )


class _Nvml:
    """NVML's answers about one GPU. unavailable: fact -> why NVML does not have it."""

    def __init__(self, pynvml: Any, handle: Any) -> None:
        self.pynvml, self.handle = pynvml, handle
        self.unavailable: dict[str, str] = {}

    def read(self, fact: str, function: str, *arguments: int) -> Any:
        """Return what an NVML function answers; None if it fails, or if an older nvidia-ml-py does not have it."""
        try:
            return getattr(self.pynvml, f"nvmlDeviceGet{function}")(self.handle, *arguments)
        except (self.pynvml.NVMLError, AttributeError) as error:
            self.unavailable[fact] = str(error)
            return None

    def flag(self, fact: str, function: str) -> bool | None:
        value = self.read(fact, function)
        return None if value is None else bool(value)

    def watts(self, fact: str, function: str) -> float | None:
        """NVML states power in milliwatts."""
        value = self.read(fact, function)
        return None if value is None else value / 1000


def _gpu_facts(pynvml: Any, index: int, handle: Any, is_loaded: bool) -> GpuFacts:
    nvml = _Nvml(pynvml, handle)
    rows = nvml.read("remapping_pending", "RemappedRows")
    mig = nvml.read("mig", "MigMode")
    nvlinks = _nvlinks(nvml)
    if rows is None:
        nvml.unavailable["remapping_failed"] = nvml.unavailable["remapping_pending"]
    return GpuFacts(
        index=index,
        name=str(pynvml.nvmlDeviceGetName(handle)),
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        pci_address=_pci_address(nvml),
        is_loaded=is_loaded,
        ecc_enabled=nvml.flag("ecc_enabled", "CurrentEccMode"),
        ecc_uncorrected=nvml.read("ecc_uncorrected", "TotalEccErrors", 1, pynvml.NVML_VOLATILE_ECC),
        ecc_corrected=nvml.read("ecc_corrected", "TotalEccErrors", 0, pynvml.NVML_VOLATILE_ECC),
        ecc_uncorrected_ever=nvml.read("ecc_uncorrected_ever", "TotalEccErrors", 1, pynvml.NVML_AGGREGATE_ECC),
        remapping_pending=None if rows is None else bool(rows[2]),
        remapping_failed=None if rows is None else bool(rows[3]),
        slowdowns=_slowdowns(nvml),
        sm_clock_mhz=nvml.read("sm_clock_mhz", "ClockInfo", pynvml.NVML_CLOCK_SM),
        sm_clock_max_mhz=nvml.read("sm_clock_max_mhz", "MaxClockInfo", pynvml.NVML_CLOCK_SM),
        power_limit_w=nvml.watts("power_limit_w", "PowerManagementLimit"),
        power_limit_default_w=nvml.watts("power_limit_default_w", "PowerManagementDefaultLimit"),
        persistence=nvml.flag("persistence", "PersistenceMode"),
        mig=None if mig is None else bool(mig[0]),
        processes=_processes(nvml),
        nvlinks=None if nvlinks is None else sum(nvlinks.values()),
        nvlinks_down=[number for number, is_up in (nvlinks or {}).items() if not is_up],
        nvlink_errors=_nvlink_errors(nvml, nvlinks or {}),
        pcie_generation=nvml.read("pcie_generation", "CurrPcieLinkGeneration"),
        pcie_generation_max=nvml.read("pcie_generation_max", "MaxPcieLinkGeneration"),
        pcie_width=nvml.read("pcie_width", "CurrPcieLinkWidth"),
        pcie_width_max=nvml.read("pcie_width_max", "MaxPcieLinkWidth"),
        unavailable=nvml.unavailable,
    )


def _pci_address(nvml: _Nvml) -> str:
    """Return the address as NVML writes it, 00000000:3B:00.0; "" if it is unknown."""
    found = nvml.read("pci_address", "PciInfo")
    return "" if found is None else _bus_id(found)


def _bus_id(pci: Any) -> str:
    """Return the address in an nvmlPciInfo_t. nvidia-ml-py has bytes or text there, by its version."""
    return pci.busId.decode() if isinstance(pci.busId, bytes) else str(pci.busId)


def _slowdowns(nvml: _Nvml) -> list[str] | None:
    reasons = nvml.read("slowdowns", "CurrentClocksEventReasons")
    return None if reasons is None else [text for bit, text in SLOWDOWNS.items() if reasons & bit]


def _processes(nvml: _Nvml) -> list[str] | None:
    """Return one text per process that computes on the GPU."""
    found = nvml.read("processes", "ComputeRunningProcesses")
    return None if found is None else [_process_text(nvml.pynvml, process) for process in found]


def _process_text(pynvml: Any, process: Any) -> str:
    try:
        name = str(pynvml.nvmlSystemGetProcessName(process.pid))
    except (pynvml.NVMLError, UnicodeDecodeError):  # of another user, or in another container
        name = "unknown program"
    used = "" if process.usedGpuMemory is None else f", {process.usedGpuMemory / MIB:.0f} MiB"
    return f"process {process.pid} ({name}{used})"


def _nvlinks(nvml: _Nvml) -> dict[int, bool] | None:
    """Return number -> whether it is active, of the GPU's NVLinks. NVML refuses the numbers of links that a GPU has not."""
    states = {
        number: nvml.read("nvlinks", "NvLinkState", number) for number in range(nvml.pynvml.NVML_NVLINK_MAX_LINKS)
    }
    found = {number: bool(state) for number, state in states.items() if state is not None}
    if found:
        nvml.unavailable.pop("nvlinks", None)
    return found or None


def _nvlink_errors(nvml: _Nvml, links: Iterable[int]) -> dict[str, dict[int, int]] | None:
    """Return the counters of all links by kind; None where NVML has none."""
    found: dict[str, dict[int, int]] = {}
    for link in links:
        for counter, kind in NVLINK_ERRORS.items():
            count = nvml.read("nvlink_errors", "NvLinkErrorCounter", link, counter)
            if count is not None:
                found.setdefault(kind, {})[link] = count
    return found or None
