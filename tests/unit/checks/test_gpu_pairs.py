"""Every two GPUs of a node copy to each other; a slow pair, and one with wrong bytes, are named, by what connects them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations, cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.artifacts.node_check_row import CheckRow
from longhaul.artifacts.site_baseline import SiteBaseline, UsualRate
from longhaul.checks import environment, node_facts, node_measurements
from longhaul.checks.amd_gpu_facts import AmdGpuFacts, AmdReading
from longhaul.checks.build_check_rows import problem_lines, warning_lines
from longhaul.checks.compare_rates_with_limits import RateLimits
from longhaul.checks.gpu_pair_copies import copy_between_gpus
from longhaul.checks.gpu_pair_paths import paths_between_torch_gpus
from longhaul.checks.judge_measurements import measurement_rows
from longhaul.checks.measurement_types import BurnIn, GpuPair, NodeMeasurements
from longhaul.checks.nvidia_gpu_facts import GpuReading
from longhaul.config.node_minimums import NodeMinimums
from longhaul.config.run_config import Checks
from longhaul.errors import BadNodesError
from tests.support.healthy_node_facts import environment_job, gpu, two_gpu_nodes
from tests.support.node_facts_of_this_machine import facts_here

CPU = torch.device("cpu")
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
GPUS = 8
ALL_PAIRS = list(combinations(range(GPUS), 2))
# Dies of MI250X by the rate of the links between them, as on LUMI.
MI250X = {(0, 1): 200, (2, 3): 200, (4, 5): 200, (6, 7): 200, (0, 6): 100, (2, 4): 100,
          (0, 2): 50, (1, 3): 50, (1, 5): 50, (3, 7): 50, (4, 6): 50, (5, 7): 50}  # fmt: skip
Rates = Mapping[tuple[int, int], float]


def nvlink_pairs(rates: Rates | None = None) -> list[GpuPair]:
    """Return the pairs of a node with an NVSwitch. rates: of those that are not at 370 GB/s"""
    return [GpuPair(*pair, (rates or {}).get(pair, 370.0), 0, "NVLink") for pair in ALL_PAIRS]


def pcie_pairs(rates: Rates | None = None) -> list[GpuPair]:
    """Return the pairs of a node with a PCIe switch per four GPUs."""
    paths = {pair: "PIX" if pair[0] // 4 == pair[1] // 4 else "SYS" for pair in ALL_PAIRS}
    usual = {"PIX": 52.0, "SYS": 35.0}
    return [GpuPair(*pair, (rates or {}).get(pair, usual[path]), 0, path) for pair, path in paths.items()]


def mi250x_pairs(rates: Rates | None = None) -> list[GpuPair]:
    """Return the pairs of the dies of four cards: 70 % of the links' rate, and 30 GB/s over another die."""
    paths = {pair: f"XGMI {MI250X[pair]} GB/s" if pair in MI250X else "XGMI over other GPUs" for pair in ALL_PAIRS}
    usual = {pair: 0.7 * MI250X[pair] if pair in MI250X else 30.0 for pair in ALL_PAIRS}
    return [GpuPair(*pair, (rates or {}).get(pair, usual[pair]), 0, path) for pair, path in paths.items()]


def rows(
    *nodes: list[GpuPair],
    gpus: int = GPUS,
    baseline: SiteBaseline | None = None,
    gpu: str = "NVIDIA H100 PCIe",
    nvlinks: int | None = None,
) -> list[CheckRow]:
    """Return the rows about pairs of these nodes. gpu: name of the GPUs, of which the datasheet says how they are connected"""
    device = BurnIn(9, 0, 640.0, 2900.0, 55.0, 54.0)
    devices = [replace(device, name=f"GPU {number}") for number in range(gpus)]
    measured = {f"n{number}": NodeMeasurements(devices, gpu_pairs=found) for number, found in enumerate(nodes, start=1)}
    found = measurement_rows(measured, RateLimits(NodeMinimums(nvlinks=nvlinks), baseline, gpu))
    return [row for row in found if "between GPUs" in row["check"]]


def bad(found: list[CheckRow]) -> list[tuple[str, str, str]]:
    return [(row["node"], row["component"], row["result"]) for row in found if row["result"] != "ok"]


def test_every_pair_copies_in_both_directions():
    """GPU 2 sends at half the rate, and two bytes from GPU 4 arrive wrong. The first copy opens the path."""
    firsts = cycle([True, *[False] * 4])

    def copy(to: torch.Tensor, source: torch.Tensor) -> float:
        sender = int(source[0]) - 1
        to.copy_(source)
        if sender == 4:
            to.view(torch.uint8)[[3, 17]] += 1
        return 9.0 if next(firsts) else 0.002 if sender == 2 else 0.001

    found = copy_between_gpus([CPU] * 6, 4000, copy)
    assert [(pair.first, pair.second) for pair in found] == list(combinations(range(6), 2))
    for pair in found:
        assert pair.gb_per_s == (0.002 if 2 in (pair.first, pair.second) else 0.004)
        assert pair.wrong_bytes == (2 if 4 in (pair.first, pair.second) else 0)


def test_copy_that_never_arrives_is_wrong():
    """Bytes that an earlier copy left in the memory do not count as received."""
    (found,) = copy_between_gpus([CPU] * 2, 4000, lambda to, source: 0.001)
    assert found.wrong_bytes > 2 * 0.9 * 4000 / 4, "each word of four bytes differs, and its high bytes may be 0"


def test_error_during_a_copy_names_the_pair():
    """CUDA's own text names no GPU, and no further call works after it."""

    def copy(to: torch.Tensor, source: torch.Tensor) -> float:
        if int(source[0]) - 1 == 2:
            raise RuntimeError("CUDA error: uncorrectable NVLink error detected during the execution\nmore")
        to.copy_(source)
        return 0.001

    with pytest.raises(
        RuntimeError,
        match=r"^copies between GPU [0-3] and GPU [0-3] by torch's numbers: CUDA error: uncorrectable NVLink",
    ) as raised:
        copy_between_gpus([CPU] * 4, 4000, copy)
    assert "GPU 2" in str(raised.value)


def test_real_copies_have_a_rate_and_a_node_with_one_gpu_has_no_pair():
    (found,) = copy_between_gpus([CPU] * 2, 4096)
    assert 0 < found.gb_per_s < 10_000 and found.wrong_bytes == 0
    assert copy_between_gpus([CPU], 4096) == []


def test_pairs_beyond_the_time_are_left_out_evenly_and_counted():
    found = copy_between_gpus([CPU] * GPUS, 4096, limit_s=0)
    assert sorted(number for pair in found for number in (pair.first, pair.second)) == list(range(GPUS))
    (unknown,) = [row for row in rows(found) if row["result"] == "unknown"]
    assert unknown["value"] == "not available: 4 of 28 pairs were measured in the time for them"


@pytest.mark.parametrize("healthy", [nvlink_pairs(), pcie_pairs(), mi250x_pairs()], ids=["NVLink", "PCIe", "MI250X"])
@pytest.mark.parametrize("nodes", [1, 4])
def test_healthy_nodes_have_no_findings(healthy: list[GpuPair], nodes: int):
    found = rows(*[healthy] * nodes)
    assert bad(found) == []
    paths = {pair.path for pair in healthy}
    assert len(found) == nodes * (1 + len(paths)), "one row for wrong bytes and one per path, not one per pair"


def test_slow_nvlink_pair_fails_and_is_named():
    found = rows(nvlink_pairs({(2, 5): 170.0, (0, 1): 290.0}))
    assert bad(found) == [("n1", "GPU 0 <-> GPU 1", "warn"), ("n1", "GPU 2 <-> GPU 5", "fail")]
    (line,) = problem_lines(found)
    assert line.startswith(
        "n1: GPU 2 <-> GPU 5: copies between GPUs, NVLink: 170 GB/s, expected >= 185 GB/s (the median of the run is 370); "
        "exclude the node; let the admins check the links between these GPUs"
    )
    (line,) = warning_lines(found)
    assert "GPU 0 <-> GPU 1: copies between GPUs, NVLink: 290 GB/s, expected >= 296 GB/s" in line
    (good,) = [row for row in found if row["result"] == "ok" and row["check"] == "copies between GPUs, NVLink"]
    assert good["value"] == "370 to 370 GB/s between 26 pairs"


def test_gpu_with_slow_links_to_most_others_is_named_instead_of_its_pairs():
    slow = {pair: 170.0 if 2 in pair else 250.0 for pair in ALL_PAIRS if 2 in pair or pair == (0, 1)}
    found = rows(nvlink_pairs(slow))
    assert bad(found) == [("n1", "GPU 2", "fail"), ("n1", "GPU 0 <-> GPU 1", "warn")]
    assert problem_lines(found)[0].startswith(
        "n1: GPU 2: copies between GPUs: 7 of 7 pairs are slow: 170 to 170 GB/s, expected >= 185 GB/s (the median of "
        "the run is 370); exclude the node; let the admins check the links of this GPU"
    )
    narrow = {pair: 6.0 for pair in ALL_PAIRS if 5 in pair}
    assert bad(rows(pcie_pairs(narrow))) == [("n1", "GPU 5", "warn")], "pairs of several paths show a narrow slot"
    bridged = [
        replace(pair, path="NVLink", gb_per_s=180.0) if pair.second == pair.first + 1 else pair
        for pair in pcie_pairs(narrow)
    ]
    bridged = [replace(pair, gb_per_s=80.0) if (pair.first, pair.second) == (4, 5) else pair for pair in bridged]
    assert bad(rows(bridged)) == [("n1", "GPU 5", "fail")], "the worst result counts, not the slowest pair"


def test_one_pair_of_gpus_is_compared_with_the_baseline_of_its_path():
    """Nothing else says whether the only pair of a node is slow. Both of its GPUs may be at fault."""
    usual = UsualRate(median=370.0, lowest=360.0, highest=375.0, count=4)
    known = SiteBaseline(H100, "good", "2026-11-29", {}, gpu_pairs={"NVLink": usual})
    for rate, result in ((300.0, None), (290.0, "warn"), (180.0, "fail")):
        pair = [GpuPair(0, 1, rate, 0, "NVLink")]
        found = rows(pair, gpus=2, gpu=H100, baseline=known)
        assert bad(found) == ([("n1", "GPU 0 <-> GPU 1", result)] if result else [])
        assert bad(rows(pair, gpus=2, gpu=H100)) == []
        assert bad(rows(pair, gpus=2, gpu=H100, baseline=replace(known, gpu=A100))) == [], "it is of other GPUs"
    (line,) = problem_lines(found)
    assert "copies between GPUs, NVLink: 180 GB/s, expected >= 185 GB/s (the site's baseline is 370)" in line


@pytest.mark.parametrize(
    ("gpu", "gpus", "path", "rate", "expected"),
    [
        (H100, 8, "NVLink", 371.0, ""),  # github.com/NVIDIA/nccl/issues/1264
        (H100, 4, "NVLink", 130.0, ""),  # direct links: github.com/NVIDIA/cuda-samples/issues/392
        (H100, 8, "NVLink", 260.0, "270 GB/s (18 NVLinks have 450 GB/s)"),
        (H100, 2, "SYS", 55.0, "90 GB/s (6 NVLinks have 150 GB/s)"),
        (H100, 2, "", 55.0, "90 GB/s (6 NVLinks have 150 GB/s)"),
        (A100, 8, "NVLink", 230.0, ""),
        (A100, 4, "NVLink", 22.0, "60 GB/s (4 NVLinks have 100 GB/s)"),
        ("NVIDIA H100 PCIe", 8, "SYS", 30.0, ""),
        ("", 8, "", 1.0, ""),
    ],
)
def test_copies_that_do_not_use_the_nvlinks_are_a_warning(gpu: str, gpus: int, path: str, rate: float, expected: str):
    """All pairs of all nodes are equal, as where peer access is off: no median shows it."""
    found = [GpuPair(*pair, rate, 0, path) for pair in combinations(range(gpus), 2)]
    lines = warning_lines(rows(found, gpus=gpus, gpu=gpu))
    assert len(lines) == bool(expected), "no GPU is named, as all are equal"
    if expected:
        assert f"{rate:g} GB/s, expected >= {expected}; let the admins check peer access" in lines[0]
        assert "set node_minimums.nvlinks of the site file to 0" in lines[0]
    assert warning_lines(rows(found, gpus=gpus, gpu=gpu, nvlinks=0)) == [], "the site says that there are none"


def test_node_all_of_whose_pairs_are_slow_has_one_row():
    """A row for each of 28 pairs would hide the other nodes; rates that differ a bit are not merged."""
    unused = {pair: 20.0 + number / 10 for number, pair in enumerate(ALL_PAIRS)}
    (line,) = warning_lines(rows(nvlink_pairs(unused), gpu=H100))
    assert line.startswith(
        "n1: copies between GPUs: 28 of 28 pairs are slow: 20 to 22.7 GB/s, expected >= 270 GB/s (18 NVLinks"
    )
    found = rows(nvlink_pairs(unused), *[nvlink_pairs()] * 2, gpu=H100)
    assert bad(found) == [("n1", "", "fail")], "the other nodes are fast"


def test_pairs_with_one_nvlink_are_not_compared_with_pairs_that_have_two():
    """Eight V100: 48 GB/s over two links, 24 over one (nvidia-smi topo -m of a DGX-1), and a slow pair of each."""
    links = {(0, 3): 2, (0, 4): 2, (1, 2): 2, (1, 5): 2, (2, 3): 2, (4, 7): 2, (5, 6): 2, (6, 7): 2,
             (0, 1): 1, (0, 2): 1, (1, 3): 1, (2, 6): 1, (3, 7): 1, (4, 5): 1, (4, 6): 1, (5, 7): 1}  # fmt: skip
    paths = {pair: f"NVLink x{links[pair]}" if pair in links else "SYS" for pair in ALL_PAIRS}
    healthy = [GpuPair(*pair, 24.0 * links.get(pair, 0.4), 0, path) for pair, path in paths.items()]
    assert bad(rows(healthy, gpu="Tesla V100-SXM2-32GB")) == []
    slow = [replace(pair, gb_per_s=11.0) if pair.first == 5 else pair for pair in healthy]
    assert bad(rows(slow, gpu="Tesla V100-SXM2-32GB")) == [
        ("n1", "GPU 5 <-> GPU 6", "fail"),
        ("n1", "GPU 5 <-> GPU 7", "fail"),
    ]


def test_slow_pair_over_pcie_warns():
    assert bad(rows(pcie_pairs({(1, 2): 13.0}))) == [("n1", "GPU 1 <-> GPU 2", "warn")]


def test_dies_of_mi250x_are_compared_with_dies_that_have_as_many_links():
    """50 GB/s are slow for the four links of a card, and more than enough for one link."""
    found = rows(mi250x_pairs({(4, 5): 50.0, (1, 3): 50.0}))
    assert bad(found) == [("n1", "GPU 4 <-> GPU 5", "fail")]


def test_unequal_paths_of_one_word_are_no_finding_where_all_nodes_have_them():
    """Two GPUs are slower on every node of the partition: so the board is built."""
    built = pcie_pairs({(0, 7): 20.0})
    assert bad(rows(built, built)) == [("n1", "GPU 0 <-> GPU 7", "warn"), ("n2", "GPU 0 <-> GPU 7", "warn")]
    assert bad(rows(built, built, built)) == []
    assert bad(rows(built, built, pcie_pairs({(0, 7): 9.0}))) == [("n3", "GPU 0 <-> GPU 7", "warn")]


def test_pairs_without_a_known_path_are_compared_with_their_place_on_other_nodes():
    hidden = [replace(pair, path="") for pair in mi250x_pairs()]
    slow = [replace(pair, gb_per_s=20.0) if pair.second == 1 else pair for pair in hidden]
    assert bad(rows(slow)) == [], "nothing to compare with"
    assert bad(rows(hidden, hidden, slow)) == [("n3", "GPU 0 <-> GPU 1", "warn")]


def test_wrong_bytes_fail_first_and_no_config_tolerates_them(tmp_path: Path):
    pairs = [replace(pair, wrong_bytes=12) if pair.second == 3 and pair.first == 1 else pair for pair in nvlink_pairs()]
    found = rows(pairs)
    assert bad(found) == [("n1", "GPU 1 <-> GPU 3", "fail")]
    assert problem_lines(found) == [
        "n1: GPU 1 <-> GPU 3: bytes copied between GPUs: 12 wrong bytes, expected 0 wrong bytes; never train on it: exclude the "
        "node, and let the admins check the link between these GPUs, and both GPUs"
    ]
    devices = [BurnIn(9, 0, 640.0, 2900.0, 55.0, 54.0, name=f"GPU {number}") for number in range(GPUS)]
    nodes = [{**node, "cpus": 96, "measured": None} for node in two_gpu_nodes()]
    nodes[1]["measured"] = NodeMeasurements(devices, gpu_pairs=pairs)
    job = environment_job(
        nodes=2, checks=Checks(bad_hardware="warn"), job_folder=str(tmp_path), out=str(tmp_path / "out.json")
    )
    with pytest.raises(BadNodesError, match="n2: GPU 1 <-> GPU 3: bytes copied between GPUs: 12 wrong bytes") as raised:
        environment._judge(nodes, job)
    assert list(raised.value.nodes) == ["n2"]


def test_paths_have_the_numbers_of_torch():
    """CUDA_VISIBLE_DEVICES=2,0,1: torch's GPUs 1 and 2 are NVML's GPUs 0 and 1."""
    nvidia = GpuReading([gpu(0, paths={"GPU-1": "NVLink", "GPU-2": "SYS"}), gpu(1), gpu(2, paths={"GPU-0": "SYS"})])
    visible: list[dict[str, Any]] = [{"uuid": str(number), "pci_address": ""} for number in (2, 0, 1)]
    assert paths_between_torch_gpus(visible, nvidia, AmdReading([])) == {(0, 1): "SYS", (1, 2): "NVLink"}
    amd = AmdReading(
        [AmdGpuFacts("0000:c1:00.0", paths={"0000:c6:00.0": "XGMI 200 GB/s"}), AmdGpuFacts("0000:c6:00.0")]
    )
    visible = [{"uuid": "", "pci_address": address} for address in ("0000:c1:00.0", "0000:c6:00.0")]
    assert paths_between_torch_gpus(visible, GpuReading([]), amd) == {(0, 1): "XGMI 200 GB/s"}
    assert paths_between_torch_gpus(visible, GpuReading([]), AmdReading([])) == {}


@pytest.mark.parametrize("is_short", [True, False])
def test_each_check_of_a_node_measures_its_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_short: bool):
    """Two CPUs stand for GPUs: also the short check before each attempt copies between them, with the path that NVML states."""
    sizes = replace(node_measurements._GPU_NODE, matrix=64, copy=4096, pair=4096, memory=4096, disk=4096, file=4096)
    monkeypatch.setattr(node_measurements, "_GPU_NODE", sizes)
    monkeypatch.setattr(node_measurements, "_gpus", lambda: [CPU] * 2)
    monkeypatch.setattr(node_measurements, "matrix_tflops", lambda device: 1.0)
    monkeypatch.setattr(node_facts, "_SHORT_BURN_IN_S", 0.1)
    reading = GpuReading([gpu(0, paths={"GPU-1": "NVLink"}), gpu(1, paths={"GPU-0": "NVLink"})])
    monkeypatch.setattr(node_facts, "read_gpus", lambda *arguments, **options: reading)
    job = environment_job(
        measures_speed=not is_short, checks=Checks(burn_in_s=0.1), folder=str(tmp_path), scratch=str(tmp_path)
    )
    monkeypatch.setattr(node_facts, "gpus", lambda: [{"uuid": str(number), "pci_address": ""} for number in range(2)])
    measured = facts_here("here", job)["measured"]
    assert measured is not None
    (pair,) = measured.gpu_pairs
    assert (pair.first, pair.second, pair.path, pair.wrong_bytes) == (0, 1, "NVLink", 0) and pair.gb_per_s > 0
