"""A module with the interface of amdsmi (ROCm 6.4 and 7), and the facts of healthy MI250X and MI300X GPUs in its form.

Functions, fields, units, enumerations and exceptions are those of amdsmi_interface.py; its functions refuse arguments of another
type, as this module does. A GPU lacks a function where its facts have no answer for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from types import ModuleType
from typing import Any

_BLOCKS = (
    "INVALID UMC SDMA GFX MMHUB ATHUB PCIE_BIF HDP XGMI_WAFL DF SMN SEM MP0 MP1 FUSE MCA VCN JPEG IH MPIO RESERVED"
)
AmdSmiGpuBlock: Any = IntEnum("AmdSmiGpuBlock", {name: 1 << index >> 1 for index, name in enumerate(_BLOCKS.split())})
AmdSmiClkType: Any = IntEnum("AmdSmiClkType", {"SYS": 0, "GFX": 0, "DF": 1, "DCEF": 2, "SOC": 3, "MEM": 4})
AmdSmiMemoryPageStatus: Any = IntEnum("AmdSmiMemoryPageStatus", {"RESERVED": 0, "PENDING": 1, "UNRESERVABLE": 2})
NOT_SUPPORTED, NO_PERMISSION = 2, 10
_WORDS = {
    NOT_SUPPORTED: "AMDSMI_STATUS_NOT_SUPPORTED - Feature not supported",
    NO_PERMISSION: "AMDSMI_STATUS_NO_PERM - Permission Denied",
    34: "AMDSMI_STATUS_DRIVER_NOT_LOADED - Driver not loaded",
}


class AmdSmiException(Exception):
    """Base class of amdsmi's errors."""


class AmdSmiLibraryException(AmdSmiException):
    def __init__(self, err_code: int) -> None:
        super().__init__(err_code)
        self.err_code, self.err_info = err_code, _WORDS[err_code]

    def __str__(self) -> str:
        return f"Error code:\n\t{self.err_code} | {self.err_info}"


class AmdSmiParameterException(AmdSmiException):
    """An argument has another type than the function takes."""


class Handle:
    """amdsmi_processor_handle, a pointer in C."""

    def __init__(self, gpu: Mapping[str, Any]) -> None:
        self.gpu = gpu


_MI250X_MB_PER_S = (
    (0, 200000, 50000, 0, 0, 0, 100000, 0),
    (200000, 0, 0, 50000, 0, 50000, 0, 0),
    (50000, 0, 0, 200000, 100000, 0, 0, 0),
    (0, 50000, 200000, 0, 0, 0, 0, 50000),
    (0, 0, 100000, 0, 0, 200000, 50000, 0),
    (0, 50000, 0, 0, 200000, 0, 0, 50000),
    (100000, 0, 0, 0, 50000, 0, 0, 200000),
    (0, 0, 0, 50000, 0, 50000, 200000, 0),
)


def mi250x(index: int, **changes: Any) -> dict[str, Any]:
    """Return a die of an MI250X: it has no slowdowns and no states of links; the second die of a card has no power limit."""
    watts = 0 if index % 2 else 560
    return {
        **_gpu(index, clock=1650, clock_max=1700, watts=watts, blocks=("UMC", "SDMA", "GFX", "MMHUB", "XGMI_WAFL")),
        "amdsmi_get_pcie_info": _pcie(width=0, speed=0),
        # As on LUMI: 4 links inside a card, 1 or 2 to some dies of other cards, none to the others.
        "max_bandwidth": {other: bandwidth for other, bandwidth in enumerate(_MI250X_MB_PER_S[index]) if bandwidth},
        **changes,
    }


def mi300x(index: int, **changes: Any) -> dict[str, Any]:
    """Return an MI300X in a node of 8, whose clock its power limit lowers."""
    links = ["X" if other == index else "U" for other in range(8)]
    return {
        **_gpu(
            index,
            clock=1450,
            clock_max=2100,
            watts=750,
            blocks=("UMC", "SDMA", "GFX", "MMHUB", "XGMI_WAFL", "PCIE_BIF"),
        ),
        "amdsmi_get_pcie_info": _pcie(width=16, speed=32000),
        "amdsmi_get_violation_status": violations(active_ppt_pwr=True),
        "amdsmi_get_gpu_xgmi_link_status": {"status": links, "total_links": 8},
        "max_bandwidth": dict.fromkeys(range(8), 64000),
        **changes,
    }


def _gpu(index: int, clock: int, clock_max: int, watts: int, blocks: Sequence[str]) -> dict[str, Any]:
    cap = {"power_cap": watts * 10**6, "default_power_cap": watts * 10**6, "dpm_cap": clock_max, "min_power_cap": 0,
           "max_power_cap": watts * 10**6}  # fmt: skip
    return {
        "index": index,
        "amdsmi_get_gpu_device_bdf": f"0000:{0xC1 + 5 * index:02x}:00.0",
        "amdsmi_get_gpu_activity": {"gfx_activity": 100, "umc_activity": 30, "mm_activity": "N/A"},
        "amdsmi_get_clock_info": {AmdSmiClkType.GFX: {"clk": clock, "min_clk": 500, "max_clk": clock_max, "clk_locked": "N/A",
                                                      "clk_deep_sleep": "N/A"}},
        "amdsmi_get_gpu_ecc_count": {AmdSmiGpuBlock[name]: errors() for name in blocks},
        "amdsmi_get_gpu_total_ecc_count": errors(),
        "amdsmi_get_gpu_bad_page_info": [],
        "amdsmi_get_power_cap_info": cap,
        "amdsmi_get_gpu_process_list": [],
    }  # fmt: skip


def errors(uncorrectable: int = 0, correctable: int = 0, deferred: int = 0) -> dict[str, int]:
    return {"correctable_count": correctable, "uncorrectable_count": uncorrectable, "deferred_count": deferred}


def page(number: int, status: int) -> dict[str, int]:
    return {"value": number, "page_address": 4096 * number, "page_size": 4096, "status": int(status)}


def process(pid: int, name: str, mebibytes: int) -> dict[str, Any]:
    used = mebibytes * 2**20
    return {"name": name, "pid": pid, "mem": used, "engine_usage": {"gfx": 0, "enc": 0},
            "memory_usage": {"gtt_mem": 0, "cpu_mem": 0, "vram_mem": used}}  # fmt: skip


def violations(**active: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"reference_timestamp": 1, "violation_timestamp": 2, "acc_counter": 3}
    for name in ("prochot_thrm", "ppt_pwr", "socket_thrm", "vr_thrm", "hbm_thrm"):
        fields |= {f"acc_{name}": 0, f"per_{name}": 0, f"active_{name}": False}
    return {**fields, **active}


def _pcie(width: int, speed: int) -> dict[str, dict[str, Any]]:
    """Return a link; speeds are in MT/s."""
    counters = ("bandwidth", "replay_count", "l0_to_recovery_count", "replay_roll_over_count", "nak_sent_count",
                "nak_received_count", "lc_perf_other_end_recovery_count")  # fmt: skip
    return {
        "pcie_static": {
            "max_pcie_width": width,
            "max_pcie_speed": speed,
            "pcie_interface_version": 5,
            "slot_type": "OAM",
        },
        "pcie_metric": {"pcie_width": width, "pcie_speed": speed, **{f"pcie_{name}": 0 for name in counters}},
    }


def fake_amdsmi(gpus: Sequence[Mapping[str, Any]], init: Callable[[], object] = lambda: None) -> ModuleType:
    """Return the module for sys.modules. init: what amdsmi_init does."""
    module = ModuleType("amdsmi")
    handles = [Handle(gpu) for gpu in gpus]
    for kind in (AmdSmiGpuBlock, AmdSmiClkType, AmdSmiMemoryPageStatus, AmdSmiException, AmdSmiLibraryException,
                 AmdSmiParameterException):  # fmt: skip
        setattr(module, kind.__name__, kind)
    names = {name for gpu in (mi250x(0), mi300x(0)) for name in gpu if name.startswith("amdsmi_")}
    for name in names:
        setattr(module, name, _function(name))
    vars(module).update(
        __version__="26.0.2",
        amdsmi_init=init,
        amdsmi_shut_down=lambda: None,
        amdsmi_get_processor_handles=lambda: handles,
        amdsmi_topo_get_link_type=_link_type,
        amdsmi_get_minmax_bandwidth_between_processors=_bandwidth,
    )
    return module


_ARGUMENTS = {"amdsmi_get_clock_info": AmdSmiClkType, "amdsmi_get_gpu_ecc_count": AmdSmiGpuBlock}


def _function(name: str) -> Callable[..., Any]:
    kind = _ARGUMENTS.get(name)

    def of_gpu(processor_handle: Handle) -> Any:
        return _answer(processor_handle, name)

    def of_part(processor_handle: Handle, part: IntEnum) -> Any:
        if not isinstance(part, kind or IntEnum):
            raise AmdSmiParameterException(f"{part}: {kind} is needed")
        try:
            return _answer(processor_handle, name)[part]
        except KeyError:
            raise AmdSmiLibraryException(NOT_SUPPORTED) from None

    return of_part if kind else of_gpu


def _link_type(processor_handle_src: Handle, processor_handle_dst: Handle) -> dict[str, int]:
    """Return type 2, XGMI, and one hop, which amdsmi also states of dies without a direct link."""
    if "max_bandwidth" not in processor_handle_src.gpu:
        raise AmdSmiLibraryException(NOT_SUPPORTED)
    return {"hops": 1, "type": 2}


def _bandwidth(processor_handle_src: Handle, processor_handle_dst: Handle) -> dict[str, int]:
    known = _answer(processor_handle_src, "max_bandwidth")
    if processor_handle_dst.gpu["index"] not in known:
        raise AmdSmiLibraryException(NOT_SUPPORTED)
    return {"min_bandwidth": 50000, "max_bandwidth": known[processor_handle_dst.gpu["index"]]}


def _answer(handle: Handle, name: str) -> Any:
    if not isinstance(handle, Handle):
        raise AmdSmiParameterException(f"{handle}: a handle is needed")
    answer = handle.gpu.get(name, AmdSmiLibraryException(NOT_SUPPORTED))
    if isinstance(answer, Exception):
        raise answer
    return answer
