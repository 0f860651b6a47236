"""Links that have new errors after the collectives of the fabric check are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longhaul.checks import new_link_errors
from longhaul.checks.new_link_errors import LinkErrors
from longhaul.runtime.process_rank import Rank
from tests.support.fake_nvml import build_fake_nvml
from tests.unit.checks.test_nvlink_errors import HEALTHY, read

GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    """Rank 0 of node n1, whose GPU has a UUID."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="aaaa"))
    monkeypatch.setattr(new_link_errors, "read_error_counters", dict)
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    return Rank(0, 8, 0, 1, "n1")


def test_gpu_and_link_with_new_errors_under_load_are_named(library: Path, rank: Rank, monkeypatch: pytest.MonkeyPatch):
    now = {**HEALTHY, "recoveries5": 2, "crc_flits9": HEALTHY["crc_flits9"] + 4000}
    readings = iter([read(library, HEALTHY), read(library, now, at_s=20.0)])
    monkeypatch.setattr(new_link_errors, "read_gpus", lambda uuids: next(readings))
    (line,) = LinkErrors(rank, GPU).new_lines()
    assert line.startswith(
        "n1: GPU 0 (PCI 0000:1b:00.0): NVLink errors during the check: CRC errors of flits: 200/s, 4000 on link 9; "
        "recoveries: 2 on link 5, expected no replay"
    )
    assert "dcgmi diag" in line


def test_healthy_links_and_gpus_without_counters_are_no_finding(
    library: Path, rank: Rank, monkeypatch: pytest.MonkeyPatch
):
    now = {**HEALTHY, "crc_flits9": HEALTHY["crc_flits9"] + 1000}  # 50/s
    for before, after in ((HEALTHY, now), ({"no_nvlink_errors": 1}, {"no_nvlink_errors": 1})):
        readings = iter([read(library, before), read(library, after, at_s=20.0)])
        monkeypatch.setattr(new_link_errors, "read_gpus", lambda uuids, left=readings: next(left))
        assert LinkErrors(rank, GPU).new_lines() == []


def test_the_first_rank_of_a_node_names_ports_whose_counters_grew(rank: Rank, monkeypatch: pytest.MonkeyPatch):
    counters = iter([{"mlx5_0 port 1 symbol_error": 3}, {"mlx5_0 port 1 symbol_error": 10}])
    monkeypatch.setattr(new_link_errors, "read_error_counters", lambda: next(counters))
    assert LinkErrors(rank, torch.device("cpu")).new_lines() == [
        "n1: errors of ports and interfaces during the collectives: mlx5_0 port 1 symbol_error +7; let the admins check cable, "
        "transceiver and switch port"
    ]
    assert LinkErrors(Rank(1, 8, 1, 1, "n1"), torch.device("cpu")).new_lines() == [], "another rank reads no port"
