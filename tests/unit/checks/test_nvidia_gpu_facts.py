"""Reads GPUs through a library with NVML's ABI, and classifies healthy and degraded A100, H100 and H200 nodes."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from pydantic import TypeAdapter

from longhaul.checks import nvidia_gpu_facts
from longhaul.checks.build_check_rows import merge_equal_rows, problem_lines, warning_lines
from longhaul.checks.nvidia_gpu_checks import nvidia_rows
from longhaul.checks.nvidia_gpu_facts import (
    GpuReading,
    _Nvml,
    with_earlier_nvlink_errors,
    with_processes_left,
    with_processes_of,
)
from tests.support.fake_nvml import MODELS, build_fake_nvml, healthy_gpu, read_fake_gpus

READING = TypeAdapter(GpuReading)
HARDWARE_SLOWDOWN, THERMAL_SLOWDOWN = 0x8, 0x20
GPU_1 = "GPU 1 (PCI 0000:2b:00.0)"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_nvml(tmp_path_factory.mktemp("nvml"))


def read(library: Path, gpus: list[dict[str, Any]], *uuids: str, **node: Any) -> GpuReading:
    """Return a reading of GPUs whose NVLinks had as many errors before."""
    reading = READING.validate_python(read_fake_gpus(library, gpus, uuids, **node))
    return with_earlier_nvlink_errors(reading, reading)


@pytest.mark.parametrize("model", MODELS)
def test_healthy_node_has_no_findings(library: Path, model: str):
    reading = read(library, [healthy_gpu(model, index) for index in range(2)])
    first = reading.gpus[0]
    assert (first.name, first.pci_address) == (MODELS[model]["name"], "00000000:1B:00.0")
    assert (first.nvlinks, first.pcie_generation, first.pcie_width) == (
        MODELS[model]["nvlinks"],
        MODELS[model]["pcie"],
        16,
    )
    assert first.power_limit_w == MODELS[model]["power_mw"] / 1000 and first.slowdowns == ["software power cap"]
    rows = nvidia_rows({"n1": reading}, 1)
    assert {row["result"] for row in rows} == {"ok"} and len(rows) == 34
    assert {row["component"] for row in merge_equal_rows(rows)} == {
        "GPU 0 (PCI 0000:1b:00.0), GPU 1 (PCI 0000:2b:00.0)"
    }


DEGRADED: dict[str, tuple[dict[str, Any], str, str]] = {
    "uncorrectable ECC error": ({"uncorrected": 2}, "fail", f"n1: {GPU_1}: uncorrectable ECC errors: 2, expected 0; drain"),
    "pending remapping": ({"remap_pending": 1}, "fail", f"n1: {GPU_1}: row remapping pending: yes, expected no; drain"),
    "failed remapping": ({"remap_failed": 1}, "fail", f"n1: {GPU_1}: row remapping failed: yes, expected no; the GPU must"),
    "power brake": ({"reasons": 0x80 | 0x4}, "fail", "slowdown: software power cap, hardware power brake, expected"),
    "hardware slowdown": ({"reasons": HARDWARE_SLOWDOWN}, "fail", "hardware slowdown, expected none by heat or hardware; check"),
    "narrow PCIe": ({"width": 8}, "fail", f"n1: {GPU_1}: PCIe width: x8, expected x16; let the admins reseat"),
    "slow PCIe under load": ({"pcie": 1}, "fail", f"n1: {GPU_1}: PCIe generation: 1, expected "),
    "NVLink down": ({"nvlink3": 0}, "fail", " active, not active: 3, expected "),
    "foreign process": ({"process": 4321}, "fail", "of other jobs: process 4321 (python1, 512 MiB), expected none"),
    "corrected ECC errors": ({"corrected": 7}, "warn", f"n1: {GPU_1}: corrected ECC errors: 7, expected 0"),
    "old ECC errors": ({"uncorrected_ever": 1}, "warn", f"n1: {GPU_1}: uncorrectable ECC errors in the GPU's life: 1"),
    "ECC off": ({"ecc": 0}, "warn", f"n1: {GPU_1}: ECC: off, expected on"),
    "hot": ({"reasons": THERMAL_SLOWDOWN}, "warn", "slowdown: software thermal slowdown"),
    "low power limit": ({"power_mw": 200_000}, "warn", f"n1: {GPU_1}: power limit: 200 W, expected "),
    "no persistence": ({"persistence": 0}, "warn", "persistence mode: off, expected on"),
    "locked clock": ({"clock": 1000, "reasons": 0}, "warn", f"n1: {GPU_1}: SM clock: 1000 MHz, expected >= 80% of the maximum"),
    "MIG": ({"mig": 1}, "warn", "MIG: on, expected off"),
    "NVLink errors": ({"replays5": 101}, "warn", "since the driver was loaded: replays: 101 on link 5, median 0, expected"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "change", "result", "message"),
    [(model, *case) for model, case in zip(cycle(MODELS), DEGRADED.values(), strict=False)],
    ids=DEGRADED,
)
def test_degraded_gpu_is_named(library: Path, model: str, change: dict[str, Any], result: str, message: str):
    reading = read(library, [healthy_gpu(model, 0), {**healthy_gpu(model, 1), **change}])
    rows = nvidia_rows({"n1": reading}, 1)
    bad = [row for row in rows if row["result"] != "ok"]
    assert [(row["component"], row["result"]) for row in bad] == [(GPU_1, result)], bad
    lines = problem_lines(rows) if result == "fail" else warning_lines(rows)
    assert len(lines) == 1 and message in lines[0], lines


def test_each_gpu_has_the_paths_to_the_others(library: Path):
    gpus = [healthy_gpu("H100", index) for index in range(5)]
    uuids = [gpu["uuid"] for gpu in gpus]
    gpus[1]["path0"], gpus[2]["path0"] = 10, 99
    del gpus[3]["path0"]
    gpus[4] |= {"nvlinks_to0": 1, "nvlinks_to1": 0}
    found = read(library, gpus).gpus
    assert found[0].paths == dict(zip(uuids[1:], ("NODE", "NODE", "NODE", "SYS"), strict=True))
    assert found[1].paths[uuids[0]] == "PIX" and found[2].paths[uuids[0]] == "level 99"
    assert list(found[3].paths) == [uuids[1], uuids[2], uuids[4]], "NVML does not know one of them"
    assert [found[4].paths[uuid] for uuid in uuids[:3]] == ["NVLink", "SYS", "SYS"], (
        "NVLink comes before the path over PCIe"
    )


def test_path_over_direct_nvlinks_has_their_number(library: Path):
    """GPU 0 has two links to GPU 1, one to GPU 2 and one to a switch. A pair with one link has half the rate."""
    gpus = [healthy_gpu("H100", index) | {f"nvlinks_to{other}": 1 for other in range(4)} for index in range(4)]
    remotes = (gpus[1]["pci"], gpus[2]["pci"], gpus[1]["pci"], "00000000:05:00.0")
    gpus[0] |= {f"remote{link}": address for link, address in enumerate(remotes)}
    found = read(library, gpus).gpus
    assert list(found[0].paths.values()) == ["NVLink x2", "NVLink x1", "NVLink"]


def test_gpu_without_nvlinks_and_without_ecc_counts_is_unknown_and_not_bad(library: Path):
    """As a PCIe card in a virtual machine: NVML answers Not Supported."""
    lacking = ("corrected", "remap_pending", "reasons", *(f"nvlink{link}" for link in range(18)))
    gpu = {key: value for key, value in healthy_gpu("H100", 0).items() if key not in lacking}
    rows = nvidia_rows({"n1": read(library, [gpu])}, 1)
    unknown = {row["check"]: row["value"] for row in rows if row["result"] == "unknown"}
    assert unknown == dict.fromkeys(
        ("corrected ECC errors", "row remapping pending", "row remapping failed", "slowdown", "SM clock", "NVLinks"),
        "not available: Not Supported",
    )
    assert problem_lines(rows) == warning_lines(rows) == []


def test_idle_gpu_may_have_a_slow_link_but_no_narrow_one(library: Path):
    reading = read(library, [{**healthy_gpu("H200", 0), "pcie": 1}])
    idle = GpuReading([gpu.__class__(**{**vars(gpu), "is_loaded": False}) for gpu in reading.gpus])
    rows = nvidia_rows({"n1": idle}, 1)
    assert [(row["check"], row["result"]) for row in rows if row["result"] != "ok"] == [
        ("SM clock", "unknown"),
        ("PCIe generation", "unknown"),
    ]


def test_clock_is_low_only_where_nothing_slows_the_gpu_down(library: Path):
    """1,584 MHz is 80 % of an H200's 1,980 MHz. A GPU at its power limit may be slower."""
    gpus = [{**healthy_gpu("H200", index), "clock": clock, "reasons": reasons}
            for index, (clock, reasons) in enumerate([(1584, 0), (1583, 0), (1200, 0x4)])]  # fmt: skip
    rows = [row for row in nvidia_rows({"n1": read(library, gpus)}, 1) if row["check"] == "SM clock"]
    assert [(row["value"], row["result"]) for row in rows] == [
        ("1584 MHz", "ok"),
        ("1583 MHz", "warn"),
        ("1200 MHz", "ok"),
    ]
    assert rows[1]["remedy"] == "let the admins reset it: nvidia-smi -rgc, and -rac"


def test_links_are_compared_with_gpus_of_the_same_name_on_other_nodes(library: Path):
    """The datasheet of a PCIe card states no number of links: it may have a bridge, or not."""
    card = {**healthy_gpu("A100", 0), "name": "NVIDIA A100 80GB PCIe"}
    dead = {**card, **{f"nvlink{link}": 0 for link in range(12)}}
    good, bad = read(library, [card]), read(library, [dead])
    assert problem_lines(nvidia_rows({"n1": bad}, 1)) == [], "cards without a bridge have no active link"
    assert problem_lines(nvidia_rows({"n1": good, "n2": bad}, 1))[0].startswith(
        "n2: GPU 0 (PCI 0000:1b:00.0): NVLinks: 0 active, not active: 0, 1,"
    )


def test_links_are_compared_with_datasheet_and_site_file(library: Path):
    """A GPU without peers whose links are all down is found; the site file replaces the datasheet's number."""
    dead = {**healthy_gpu("H100", 0), **{f"nvlink{link}": 0 for link in range(18)}}
    found = {"n1": read(library, [dead])}
    assert ", expected 18 active" in problem_lines(nvidia_rows(found, 1))[0]
    assert problem_lines(nvidia_rows(found, 1, min_nvlinks=0)) == []
    assert ", expected 6 active" in problem_lines(nvidia_rows(found, 1, min_nvlinks=6))[0]


def test_only_the_gpus_of_the_job_are_judged(library: Path):
    gpus = [healthy_gpu("H100", 0), {**healthy_gpu("H100", 1), "process": 99}]
    uuid = gpus[0]["uuid"].removeprefix("GPU-")
    assert [gpu.index for gpu in read(library, gpus, uuid).gpus] == [0]
    assert len(read(library, gpus, "MIG-of-another-form").gpus) == 2


def test_processes_are_those_before_the_check_used_the_gpus(library: Path):
    before = read(library, [healthy_gpu("H100", 0)])
    now = read(library, [{**healthy_gpu("H100", 0), "process": 99}])
    assert with_processes_of(before, now).gpus[0].processes == []


def test_processes_that_are_left_are_those_of_before(library: Path):
    """The memory of an ending process changes; a process that starts later is this one, which has opened the GPU."""
    before, now = (
        read(library, [{**healthy_gpu("H100", 0), **change}]) for change in ({"process": 99}, {"process": 99})
    )
    fewer = replace(
        now, gpus=[replace(now.gpus[0], processes=["process 99 (python1, 1 MiB)", "process 7 (me, 9 MiB)"])]
    )
    assert with_processes_left(before, fewer).gpus[0].processes == ["process 99 (python1, 1 MiB)"]
    none = replace(now, gpus=[replace(now.gpus[0], processes=None)])
    assert with_processes_left(before, none).gpus[0].processes is None
    assert with_processes_left(none, fewer).gpus[0].processes == []


def test_nvml_that_cannot_count_the_gpus_is_reported(library: Path):
    """As after a GPU has fallen off the bus: nvmlInit works, and what follows does not."""
    (row,) = nvidia_rows({"n1": read(library, [healthy_gpu("H100", 0)], count=999)}, 1)
    assert (row["result"], row["value"]) == ("unknown", "not available: NVML: Unknown Error")


def test_nvml_that_does_not_answer_fails_the_node(monkeypatch: pytest.MonkeyPatch):
    """Nothing ends a call into a driver that hangs."""
    ended = Event()
    monkeypatch.setattr(nvidia_gpu_facts, "_NVML_S", 0.01)
    monkeypatch.setattr(nvidia_gpu_facts, "_read_gpus", lambda *arguments: ended.wait(60))
    (line,) = problem_lines(nvidia_rows({"n1": nvidia_gpu_facts.read_gpus()}, 1))
    ended.set()
    assert line.startswith(
        "n1: state of the GPUs: NVML: no answer within 0.01 s, expected NVML answers; a GPU may hang"
    )


def test_function_that_an_older_nvidia_ml_py_lacks_is_an_unknown_value():
    older: Any = SimpleNamespace(NVMLError=pynvml.NVMLError, __name__="pynvml")
    nvml = _Nvml(older, None)
    assert nvml.read("slowdowns", "CurrentClocksEventReasons") is None
    assert "nvmlDeviceGetCurrentClocksEventReasons" in nvml.unavailable["slowdowns"]


def test_lost_gpu_is_named_and_the_others_are_read(library: Path):
    reading = read(library, [healthy_gpu("H100", 0), {"lost": 1}])
    (line,) = problem_lines(nvidia_rows({"n1": reading}, 2))
    assert line.startswith("n1: GPU 1: NVML: GPU is lost, expected an answer; drain the node and reset the GPU")


def test_lost_gpu_that_the_job_does_not_need_is_a_warning(library: Path):
    reading = read(library, [healthy_gpu("H100", 0), {"lost": 1}])
    rows = nvidia_rows({"n1": reading}, 1)
    assert problem_lines(rows) == []
    assert warning_lines(rows) == [
        "n1: GPU 1: NVML: GPU is lost, expected an answer; tell the admins; this job does not use the GPU"
    ]


def test_driver_mismatch_fails_and_a_missing_library_is_unknown(library: Path, tmp_path: Path):
    mismatch = nvidia_rows({"n1": read(library, [], init=18)}, 1)
    assert problem_lines(mismatch)[0].startswith("n1: NVIDIA driver: NVML: RM has detected an NVML/RM version mismatch")
    none = READING.validate_python(read_fake_gpus(tmp_path, []))
    (row,) = nvidia_rows({"n1": none}, 1)
    assert row["result"] == "unknown" and row["value"] == "not available: NVML: NVML Shared Library Not Found"
    assert "--nv" in row["remedy"]
