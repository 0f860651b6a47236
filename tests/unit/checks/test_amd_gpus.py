"""Reads AMD GPUs through a module with the interface of amdsmi and through the driver's files, and classifies them."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from longhaul.artifacts.node_check_row import CheckRow
from longhaul.checks import amd_gpu_reading
from longhaul.checks.amd_gpu_checks import amd_kernel_log_rows, amd_rows
from longhaul.checks.amd_gpu_facts import AmdReading, with_earlier_processes
from longhaul.checks.amd_gpu_library import read_library
from longhaul.checks.amd_gpu_reading import read_amd_gpus
from longhaul.checks.amd_kernel_log import AmdKernelError
from longhaul.checks.build_check_rows import problem_lines, warning_lines
from longhaul.checks.hardware_checks import hardware_rows
from longhaul.checks.hardware_facts import HardwareFacts
from longhaul.checks.kernel_log import KernelLog
from longhaul.checks.nvidia_gpu_facts import GpuReading
from longhaul.checks.pcie_links import PcieLink
from tests.support.fake_amdsmi import (
    NO_PERMISSION,
    AmdSmiGpuBlock,
    AmdSmiLibraryException,
    AmdSmiMemoryPageStatus,
    errors,
    fake_amdsmi,
    mi250x,
    mi300x,
    page,
    process,
    violations,
)
from tests.support.healthy_node_facts import HEALTHY_CORES, environment_job, hardware, link, two_gpu_nodes
from tests.support.sysfs_tree import write_tree

ADDRESS, OTHER = "0000:c1:00.0", "0000:c6:00.0"
GPUS = 8
"""GPUs that a job needs of each node."""


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that reads a node whose amdsmi shows these GPUs, and whose driver has these files for each of them."""

    def read_node(
        *gpus: dict[str, Any], addresses: tuple[str, ...] = (), files: dict[str, Any] | None = None
    ) -> AmdReading:
        monkeypatch.setitem(sys.modules, "amdsmi", fake_amdsmi(gpus))
        add_driver_files(tmp_path, files or {}, *(gpu["amdsmi_get_gpu_device_bdf"] for gpu in gpus))
        return read_amd_gpus(addresses, tmp_path)

    return read_node


def add_driver_files(root: Path, files: dict[str, Any], *addresses: str) -> None:
    for address in addresses:
        write_tree(root / "bus" / "pci" / "drivers" / "amdgpu" / address, {"vendor": "0x1002", **files})


def results(rows: list[CheckRow], result: str) -> dict[str, str]:
    """Return check -> value, of the rows with this result."""
    return {row["check"]: row["value"] for row in rows if row["result"] == result}


def test_healthy_mi300x_node_has_no_findings(read: Any):
    """Its power limit lowers the clock to 69 % of the maximum, which is no locked clock."""
    reading = read(*map(mi300x, range(8)))
    gpu = reading.gpus[0]
    assert (gpu.power_limit_w, gpu.slowdowns, gpu.xgmi_links, gpu.xgmi_links_down) == (750.0, ["power limit"], 7, [])
    assert (gpu.gfx_clock_mhz, gpu.activity, gpu.pcie_speed, gpu.pcie_width) == (1450, 100, 32.0, 16)
    rows = amd_rows({"n1": reading}, GPUS)
    assert {row["result"] for row in rows} == {"ok"} and len(rows) == 1 + 8 * 9
    assert results(rows, "ok")["source of the GPUs' state"] == "amdsmi 26.0.2 and files of the driver amdgpu"


def test_healthy_mi250x_node_has_no_findings_and_says_what_is_unknown(read: Any):
    """The second die of a card has no power limit of its own. ROCm states slowdowns and links from MI300 on."""
    rows = amd_rows({"n1": read(*map(mi250x, range(2)))}, GPUS)
    unsupported = "not available: amdsmi: AMDSMI_STATUS_NOT_SUPPORTED - Feature not supported"
    assert results(rows, "unknown") == dict.fromkeys(("slowdown", "clock of the shaders", "XGMI links"), unsupported)
    assert [row["component"] for row in rows if row["check"] == "power limit"] == [f"GPU {ADDRESS}"]
    assert problem_lines(rows) == warning_lines(rows) == []


def test_paths_of_dies_tell_the_links_between_them(read: Any):
    """MI250X: dies of one card have four links; MI300X: all GPUs are equal. A GPU without an answer has no path."""
    found = read(*map(mi250x, range(8))).gpus
    addresses = [gpu.address for gpu in found]
    paths = [found[0].paths[address] for address in addresses[1:]]
    over, one, two, four = "XGMI over other GPUs", "XGMI 50 GB/s", "XGMI 100 GB/s", "XGMI 200 GB/s"
    assert paths == [four, one, over, over, over, two, over]
    assert all(
        gpu.paths[other.address] == other.paths[gpu.address] for gpu in found for other in found if gpu is not other
    )
    assert {path for gpu in read(*map(mi300x, range(8))).gpus for path in gpu.paths.values()} == {"XGMI 64 GB/s"}
    silent = {name: value for name, value in mi300x(1).items() if name != "max_bandwidth"}
    assert read(silent, mi300x(2)).gpus[0].paths == {}


def test_amdsmi_without_the_function_of_links_gives_everything_else(read: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.support.fake_amdsmi._link_type", None)
    found = read(mi300x(0), mi300x(1))
    assert found.error == "" and found.gpus[0].paths == {} and found.gpus[0].xgmi_links == 7


RESERVED, PENDING, UNRESERVABLE = (page(number, status) for number, status in enumerate(AmdSmiMemoryPageStatus))
LOW_CLOCK = {"clk": 1000, "min_clk": 500, "max_clk": 2100, "clk_locked": True, "clk_deep_sleep": 0}
DEGRADED: dict[str, tuple[dict[str, Any], str, str]] = {
    "uncorrectable error": ({"amdsmi_get_gpu_ecc_count": {AmdSmiGpuBlock["UMC"]: errors(2), AmdSmiGpuBlock["GFX"]: errors()}},
                            "fail", "uncorrectable ECC errors: 2 in umc, expected 0; drain the node and reset"),
    "no counters per block": ({"amdsmi_get_gpu_ecc_count": {}, "amdsmi_get_gpu_total_ecc_count": errors(3)},
                              "fail", "uncorrectable ECC errors: 3 in all blocks, expected 0; drain"),
    "corrected errors": ({"amdsmi_get_gpu_ecc_count": {AmdSmiGpuBlock["XGMI_WAFL"]: errors(0, 7)}},
                         "warn", "corrected ECC errors: 7 in xgmi_wafl, expected 0; watch"),
    "deferred error": ({"amdsmi_get_gpu_ecc_count": {AmdSmiGpuBlock["UMC"]: errors(0, 0, 1)}},
                       "warn", "deferred ECC errors: 1 in umc, expected 0; watch"),
    "bad pages": ({"amdsmi_get_gpu_bad_page_info": [RESERVED, RESERVED]}, "warn", "bad pages of the memory: 2 out of use"),
    "pending page": ({"amdsmi_get_gpu_bad_page_info": [RESERVED, PENDING]},
                     "fail", "bad pages of the memory: 1 out of use, 1 pending, expected 0; drain"),
    "bad page in use": ({"amdsmi_get_gpu_bad_page_info": [UNRESERVABLE]}, "fail", "bad pages of the memory: 1 still in use, exp"),
    "PROCHOT": ({"amdsmi_get_violation_status": violations(active_prochot_thrm=True)},
                "fail", "slowdown: hardware slowdown (PROCHOT), expected none by heat or hardware; check"),
    "hot memory": ({"amdsmi_get_violation_status": violations(active_hbm_thrm=True)},
                   "warn", "slowdown: thermal slowdown by the memory, expected none"),
    "low power limit": ({"amdsmi_get_power_cap_info": {"power_cap": 500_000_000, "default_power_cap": 750_000_000}},
                        "warn", "power limit: 500 W, expected 750 W; let the admins reset it (amd-smi"),
    "locked clock": ({"amdsmi_get_clock_info": [LOW_CLOCK], "amdsmi_get_violation_status": violations()},
                     "warn", "clock of the shaders: 1000 MHz, expected >= 80% of the maximum, 2100 MHz; let the admins"),
    "foreign process": ({"amdsmi_get_gpu_process_list": [process(7, "python", 512), process(8, "opens all GPUs", 0)]},
                        "warn", "processes of other jobs: process 7 (python, 512 MiB), expected none; end them"),
    "XGMI link down": ({"amdsmi_get_gpu_xgmi_link_status": {"status": list("UXUUDUUU"), "total_links": 8}},
                       "fail", "XGMI links: 6 active, not active: 4, expected 7 active; drain"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "result", "message"), DEGRADED.values(), ids=DEGRADED)
def test_degraded_mi300x_is_named(read: Any, change: dict[str, Any], result: str, message: str):
    rows = amd_rows({"n1": read(mi300x(0), mi300x(1, **change))}, GPUS)
    bad = [row for row in rows if row["result"] != "ok"]
    assert [(row["component"], row["result"]) for row in bad] == [(f"GPU {OTHER}", result)], bad
    (line,) = problem_lines(rows) if result == "fail" else warning_lines(rows)
    assert line.startswith(f"n1: GPU {OTHER}: {message}")


CARD_2 = "0000:cb:00.0"
"""First die of the second MI250X card of a node."""
HEALTHY_MI250X_FILES = {
    **{f"ras/{block}_err_count": "ue: 0\nce: 0\nde: 0" for block in ("umc", "sdma", "gfx", "mmhub", "xgmi_wafl")},
    "ras/gpu_vram_bad_pages": "", "hwmon/hwmon5/power1_cap": 560_000_000, "hwmon/hwmon5/power1_cap_default": 560_000_000,
}  # fmt: skip
LOW_CAP = {"power_cap": 450_000_000, "default_power_cap": 560_000_000}
BAD_PAGES = "0x027f5d43 : 0x00001000 : R\n0x027f5f5b : 0x00001000 : P"
MI250X_FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "uncorrectable error": ({"amdsmi_get_gpu_ecc_count": {AmdSmiGpuBlock["UMC"]: errors(2)}},
                            {"ras/umc_err_count": "ue: 2\nce: 0\nde: 0"},
                            "fail", "uncorrectable ECC errors: 2 in umc, expected 0; drain the node and reset"),
    "corrected errors": ({"amdsmi_get_gpu_ecc_count": {AmdSmiGpuBlock["XGMI_WAFL"]: errors(0, 17)}},
                         {"ras/xgmi_wafl_err_count": "ue: 0\nce: 17\nde: 0"},
                         "warn", "corrected ECC errors: 17 in xgmi_wafl, expected 0; watch"),
    "deferred error": ({"amdsmi_get_gpu_ecc_count": {AmdSmiGpuBlock["UMC"]: errors(0, 0, 1)}},
                       {"ras/umc_err_count": "ue: 0\nce: 0\nde: 1"}, "warn", "deferred ECC errors: 1 in umc, expected 0; watch"),
    "pending page": ({"amdsmi_get_gpu_bad_page_info": [RESERVED, PENDING]}, {"ras/gpu_vram_bad_pages": BAD_PAGES},
                     "fail", "bad pages of the memory: 1 out of use, 1 pending, expected 0; drain"),
    "low power limit": ({"amdsmi_get_power_cap_info": LOW_CAP}, {"hwmon/hwmon5/power1_cap": 450_000_000},
                        "warn", "power limit: 450 W, expected 560 W; let the admins reset it (amd-smi"),
}  # fmt: skip


@pytest.mark.parametrize("source", ["amdsmi", "driver"])
@pytest.mark.parametrize(("change", "files", "result", "message"), MI250X_FAULTS.values(), ids=MI250X_FAULTS)
def test_degraded_mi250x_is_named(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, change: dict[str, Any],
    files: dict[str, Any], result: str, message: str,
):  # fmt: skip
    """A node of two cards, so of four dies, as amdsmi shows it, and as only the driver's files do."""
    if source == "amdsmi":
        reading = read(mi250x(0), mi250x(1), mi250x(2, **change), mi250x(3))
    else:
        monkeypatch.setitem(sys.modules, "amdsmi", None)
        add_driver_files(tmp_path, HEALTHY_MI250X_FILES, ADDRESS, OTHER, CARD_2, "0000:d0:00.0")
        add_driver_files(tmp_path, files, CARD_2)
        reading = read_amd_gpus(sys=tmp_path)
    rows = amd_rows({"n1": reading}, GPUS)
    bad = [row for row in rows if row["result"] in ("warn", "fail")]
    assert [(row["component"], row["result"]) for row in bad] == [(f"GPU {CARD_2}", result)], bad
    (line,) = problem_lines(rows) if result == "fail" else warning_lines(rows)
    assert line.startswith(f"n1: GPU {CARD_2}: {message}")


def test_xgmi_links_do_not_fail_a_job_with_one_gpu_per_node(read: Any):
    """A GPU alone sends nothing over them."""
    down = mi300x(1, amdsmi_get_gpu_xgmi_link_status={"status": list("UXUUDUUU"), "total_links": 8})
    readings = {"n1": read(mi300x(0)), "n2": read(down)}
    assert results(amd_rows(readings, 2), "fail") == {"XGMI links": "6 active, not active: 4"}
    assert results(amd_rows(readings, 1), "fail") == {}


def test_clock_of_an_idle_gpu_is_unknown(read: Any):
    idle = mi300x(0, amdsmi_get_gpu_activity={"gfx_activity": 0}, amdsmi_get_violation_status=violations())
    assert results(amd_rows({"n1": read(idle)}, GPUS), "unknown") == {
        "clock of the shaders": "not available: the GPU is idle, at 1450 MHz"
    }


ECC_FILES = {"ras/umc_err_count": "ue: 1\nce: 0\nde: 0", "ras/gpu_vram_bad_pages": "0x1 : 0x1000 : R"}


def test_call_that_fails_is_answered_by_the_files_or_unknown(read: Any):
    """All functions refuse, as in a container without permissions; the driver's files are there."""
    gpu = {name: AmdSmiLibraryException(NO_PERMISSION) for name in mi300x(0)}
    rows = amd_rows({"n1": read({**gpu, "amdsmi_get_gpu_device_bdf": ADDRESS}, files=ECC_FILES)}, GPUS)
    assert results(rows, "fail") == {"uncorrectable ECC errors": "1 in umc"}
    assert results(rows, "warn") == {"bad pages of the memory": "1 out of use"}
    refused = "not available: amdsmi: AMDSMI_STATUS_NO_PERM - Permission Denied"
    checks = ("slowdown", "processes of other jobs", "clock of the shaders", "XGMI links", "power limit")
    assert results(rows, "unknown") == dict.fromkeys(checks, refused)


def test_numbers_that_stand_for_no_value_are_unknown(read: Any):
    """ROCm 6.3 gives the largest integer, later versions `N/A`; ROCm 6.3 has no states of links, and fields may be missing."""
    cap = {"power_cap": 2**64 - 1, "default_power_cap": 2**64 - 1}
    clock = {"clk": "N/A", "max_clk": 2**32 - 1}
    reading = read(mi300x(0, amdsmi_get_power_cap_info=cap, amdsmi_get_clock_info=[clock], amdsmi_get_violation_status={},
                          amdsmi_get_gpu_bad_page_info="No bad pages found."))  # fmt: skip
    assert results(amd_rows({"n1": reading}, GPUS), "unknown") == {
        "bad pages of the memory": "not available: amdsmi: no value",
        "power limit": "not available: amdsmi: no value",
        "slowdown": "not available: amdsmi: 'active_ppt_pwr'",
        "clock of the shaders": "not available: amdsmi: no value",
    }
    delattr(sys.modules["amdsmi"], "amdsmi_get_gpu_xgmi_link_status")
    assert "no attribute" in read_library()[1][ADDRESS].unavailable["xgmi_links"]


def test_counts_without_a_number_are_unknown_and_those_of_the_files_replace_them(read: Any):
    no_counts = dict.fromkeys(errors(), "N/A")
    gpu = mi300x(0, amdsmi_get_gpu_ecc_count={AmdSmiGpuBlock["UMC"]: no_counts})
    assert results(amd_rows({"n1": read(gpu)}, GPUS), "unknown") == dict.fromkeys(
        ("uncorrectable ECC errors", "corrected ECC errors", "deferred ECC errors"), "not available: amdsmi: no value"
    )
    rows = amd_rows({"n1": read(gpu, files=ECC_FILES)}, GPUS)
    assert results(rows, "fail") == {"uncorrectable ECC errors": "1 in umc"} and results(rows, "unknown") == {}


NO_QUERY = "Query currently inaccessible"


@pytest.mark.parametrize(
    ("umc", "gfx", "uncorrected", "reason"),
    [
        (NO_QUERY, NO_QUERY, None, f"gfx_err_count: {NO_QUERY}"),
        ("ue: 0\nce: 0", NO_QUERY, None, f"gfx_err_count: {NO_QUERY}"),
        ("ue: 0\nce: 0", "", None, "gfx_err_count: it is empty"),
        ("ue: 2\nce: 0", NO_QUERY, {"umc": 2}, None),
        ("ue: 0\nce: 0", "ue: 0\nce: 0", {}, None),
    ],
)
def test_counters_of_the_driver_without_an_answer_are_unknown(
    tmp_path: Path, umc: str, gfx: str, uncorrected: dict[str, int] | None, reason: str | None
):
    add_driver_files(tmp_path, {"ras/umc_err_count": umc, "ras/gfx_err_count": gfx}, ADDRESS)
    (gpu,) = read_amd_gpus(sys=tmp_path).gpus
    assert (gpu.uncorrected, gpu.unavailable.get("uncorrected")) == (uncorrected, reason)
    (row,) = (row for row in amd_rows({"n1": AmdReading([gpu])}, GPUS) if row["check"] == "uncorrectable ECC errors")
    assert row["result"] == ("unknown" if reason else "fail" if uncorrected else "ok")


def test_files_of_the_driver_that_cannot_be_read_are_unknown_and_an_empty_list_of_pages_is_none(tmp_path: Path):
    """The kernel answers EINVAL to a query that fails; here a folder answers EISDIR."""
    files = {"ras/umc_err_count": "ue: 0\nce: 0", "ras/gpu_vram_bad_pages": ""}
    add_driver_files(tmp_path, files, ADDRESS)
    ras = tmp_path / "bus" / "pci" / "drivers" / "amdgpu" / ADDRESS / "ras"
    rows = amd_rows({"n1": read_amd_gpus(sys=tmp_path)}, GPUS)
    assert results(rows, "ok")["bad pages of the memory"] == "0"
    assert results(rows, "unknown")["deferred ECC errors"] == "not available: the driver amdgpu does not count them"
    (ras / "gpu_vram_bad_pages").write_text(NO_QUERY)
    assert results(amd_rows({"n1": read_amd_gpus(sys=tmp_path)}, GPUS), "unknown")["bad pages of the memory"].endswith(
        NO_QUERY
    )
    for name in ("gpu_vram_bad_pages", "gfx_err_count"):
        (ras / name).unlink(missing_ok=True)
        (ras / name).mkdir()
    (gpu,) = read_amd_gpus(sys=tmp_path).gpus
    assert gpu.bad_pages is None and gpu.unavailable["bad_pages"] == "gpu_vram_bad_pages: Is a directory"
    assert gpu.uncorrected is None and gpu.unavailable["uncorrected"] == "gfx_err_count: Is a directory"


@pytest.mark.parametrize(
    ("init", "reason", "result", "remedy"),
    [
        (
            AmdSmiLibraryException(34),
            "amdsmi: AMDSMI_STATUS_DRIVER_NOT_LOADED - Driver not loaded",
            "unknown",
            "make /sys/module/amdgpu",
        ),
        (
            OSError("libamd_smi.so: cannot open shared object file"),
            "amdsmi: libamd_smi.so: cannot open shared object file",
            "unknown",
            "install the amdsmi of the node's ROCm",
        ),
        (
            ImportError("No module named 'amdsmi'"),
            "the package amdsmi is not installed",
            "unknown",
            "install the amdsmi",
        ),
        (
            None,
            "amdsmi: no answer within 0.05 s",
            "warn",
            "a GPU may hang: run amd-smi or rocm-smi on the node, and drain it",
        ),
    ],
)
def test_node_without_amdsmi_has_the_rows_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: Exception | None, reason: str, result: str, remedy: str
):
    """None: amdsmi never returns, as from a GPU that hangs."""

    def fail() -> None:
        if init is None:
            Event().wait()
        else:
            raise init

    monkeypatch.setitem(sys.modules, "amdsmi", fake_amdsmi([mi300x(0)], fail))
    monkeypatch.setattr(amd_gpu_reading, "_LIBRARY_S", 0.05 if init is None else 30.0)
    add_driver_files(tmp_path, {"ras/umc_err_count": "ue: 1\nce: 0\nde: 0", "hwmon/hwmon1/power1_cap": 0}, ADDRESS)
    rows = amd_rows({"n1": read_amd_gpus(sys=tmp_path)}, GPUS)
    assert results(rows, "fail") == {"uncorrectable ECC errors": "1 in umc"}
    (row,) = (row for row in rows if row["check"] == "slowdowns, clocks, processes and XGMI links")
    assert (row["value"], row["result"]) == (f"not available: {reason}", result) and row["remedy"].startswith(remedy)
    others = [other for other in rows if other is not row]
    assert results(others, "unknown") == {
        "bad pages of the memory": "not available: the driver amdgpu does not list them",
        "power limit": "not available: the driver amdgpu does not state it",
    }
    assert results(rows, "ok")["source of the GPUs' state"] == "files of the driver amdgpu"


def test_consumer_card_has_no_counters_and_node_without_driver_is_unknown(tmp_path: Path):
    add_driver_files(
        tmp_path, {"hwmon/hwmon1/power1_cap": 250_000_000, "hwmon/hwmon1/power1_cap_default": 250_000_000}, ADDRESS
    )
    rows = amd_rows({"n1": read_amd_gpus(sys=tmp_path), "n2": read_amd_gpus(sys=tmp_path / "none")}, GPUS)
    assert results(rows, "unknown")["uncorrectable ECC errors"] == "not available: the driver amdgpu has no counters"
    assert [(row["node"], row["check"]) for row in rows[-1:]] == [("n2", "state of the GPUs")]


def test_only_the_gpus_of_the_job_are_judged(read: Any):
    gpus = [mi300x(0), mi300x(1, amdsmi_get_gpu_process_list=[process(7, "python", 512)])]
    assert [gpu.address for gpu in read(*gpus, addresses=(ADDRESS,)).gpus] == [ADDRESS]
    assert len(read(*gpus, addresses=("",)).gpus) == 2, "torch does not state the address in each build"


def test_process_that_started_after_the_check_is_this_one(read: Any):
    def using(*pids: int) -> AmdReading:
        return read(mi300x(0, amdsmi_get_gpu_process_list=[process(pid, "python", 9) for pid in pids]))

    found = with_earlier_processes(using(7), using(7, os.getpid()))
    assert found.gpus[0].processes == {7: "process 7 (python, 9 MiB)"}
    unread = replace(found, gpus=[replace(found.gpus[0], processes=None)])
    assert with_earlier_processes(unread, using(7)).gpus[0].processes is None


def test_width_of_the_link_is_that_of_amdsmi(read: Any, tmp_path: Path):
    """The kernel's file has the full width, as of a switch inside the GPU."""
    narrow = {**mi300x(0)["amdsmi_get_pcie_info"]}
    narrow["pcie_metric"] = {**narrow["pcie_metric"], "pcie_width": 8}
    kernel: list[PcieLink] = [link(ADDRESS, "GPU", vendor="0x1002")]

    def node(**changes: Any) -> HardwareFacts:
        reading = read(mi300x(0, **changes))
        links = amd_gpu_reading.with_amd_links(kernel, reading.gpus)
        return hardware(gpus=hardware().gpus.__class__([]), amd_gpus=reading, pcie_links=links)

    job = environment_job(build="rocm 7.0", interconnect="ethernet")
    good, bad = node(), node(amdsmi_get_pcie_info=narrow)
    rows = hardware_rows([_facts("n1", good), _facts("n2", bad)], job)
    assert problem_lines(rows) == [
        f"n2: GPU {ADDRESS}: PCIe link: 32 GT/s x8, expected 32 GT/s x16, as on another node; let the admins reseat the card, "
        "and look for PCIe errors in the kernel log"
    ]
    plain = amd_gpu_reading.with_amd_links(kernel, read(mi250x(0)).gpus)
    assert plain == kernel, "the link to an MI250X is none of PCIe"


def _facts(host: str, facts: HardwareFacts) -> dict[str, Any]:
    return {"host": host, "hardware": facts, "measured": None, "gpus": [], "cpus": 8, "core_speed": HEALTHY_CORES,
            "run_folder_seen_after_s": 0.1, "own_file_seen_after_s": 0.1}  # fmt: skip


def test_gpu_whose_reset_failed_is_bad_and_other_resets_are_a_warning(read: Any):
    reading = read(mi300x(0), mi300x(1))
    events = [
        AmdKernelError("failed GPU reset", OTHER, 1, "amdgpu: GPU reset(1) failed"),
        AmdKernelError("GPU reset", ADDRESS, 2, "amdgpu: GPU reset begin!"),
        AmdKernelError("failed GPU reset", "0000:99:00.0", 1, "amdgpu: GPU reset(1) failed"),
    ]
    node = {"host": "n1", "gpus": [], "measured": None, "hardware": hardware(
        gpus=GpuReading([], "no NVML"), amd_gpus=reading, kernel_log=KernelLog([], amd_errors=events))}  # fmt: skip
    facts = [{**two_gpu_nodes()[0], **node, "cpus": 96}]
    job = environment_job(build="rocm 6.4", nodes=1, gpus_per_node=2)
    found = [row for row in hardware_rows(facts, job) if row["check"] == "kernel log"]
    assert [(row["component"], row["result"]) for row in found] == [
        (f"GPU {OTHER}", "fail"),
        (f"GPU {ADDRESS}", "warn"),
        ("GPU 0000:99:00.0", "warn"),
    ]
    assert problem_lines(found) == [
        f"n1: GPU {OTHER}: kernel log: failed GPU reset: amdgpu: GPU reset(1) failed, expected no hardware errors and no resets "
        "of GPUs; drain the node and restart it; if it happens again, the GPU must be replaced"
    ]
    assert found[1]["value"] == "GPU reset, 2 times: amdgpu: GPU reset begin!"
    assert "a program can cause a reset" in found[1]["remedy"] and "this job does not use the GPU" in found[2]["remedy"]
    quiet, closed = (
        list(amd_kernel_log_rows("n1", log, reading, 2)) for log in (KernelLog([]), KernelLog([], "closed"))
    )
    assert [row["result"] for row in (*quiet, *closed)] == ["ok", "unknown"]


def test_gpu_that_torch_cannot_use_after_a_failed_reset_is_one_of_the_job(read: Any):
    """The node shows one GPU of two, so the one that is missing is not another job's."""
    log = KernelLog([], amd_errors=[AmdKernelError("failed GPU reset", OTHER, 1, "amdgpu: GPU reset(1) failed")])
    reading = read(mi300x(0), mi300x(1), addresses=(ADDRESS,))
    results_by_gpus = {gpus: list(amd_kernel_log_rows("n1", log, reading, gpus)) for gpus in (1, 2)}
    assert [row["result"] for rows in results_by_gpus.values() for row in rows] == ["warn", "fail"]
    assert "restart it" in results_by_gpus[2][0]["remedy"]
