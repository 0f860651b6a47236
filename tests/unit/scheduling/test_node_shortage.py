"""Too few nodes beside the quarantine: found before a retry, with the reason of each quarantined node."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.artifacts.quarantine import Quarantine, add_to_quarantine
from longhaul.scheduling import slurm_client
from longhaul.scheduling.node_shortage import find_shortage, quarantine_text, shortage_of_job, shortage_remedy
from tests.support.supervised_job import write_job

SLOW = "n1 (slow with most other nodes; found by fabric, job 5)"


@pytest.fixture
def quarantine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The quarantine of a run on a partition with three nodes; it holds n1."""
    monkeypatch.setattr(slurm_client, "partition_nodes", lambda partition: ["n1", "n2", "n3"])
    path = tmp_path / "quarantine.json"
    add_to_quarantine(path, {"n1": "slow with most other nodes"}, "fabric, job 5")
    return path


@pytest.mark.parametrize(
    ("needed", "excluded", "cause", "left"),
    [
        (2, [], None, None),
        (3, [], f"3 nodes are needed; partition main has 3, of which 1 is quarantined: {SLOW}", "at most 2 nodes"),
        (2, ["n3", "elsewhere"], f"2 nodes are needed; partition main has 3, of which 2 are quarantined: {SLOW}, n3",
         "at most 1 node"),
        (2, ["n2", "n3"], f"2 nodes are needed; partition main has 3, of which 3 are quarantined: {SLOW}, n2, n3", None),
    ],
)  # fmt: skip
def test_nodes_are_counted_without_the_quarantined_ones(
    needed: int, excluded: list[str], cause: str | None, left: str | None, quarantine: Path
):
    found = find_shortage("main", needed, quarantine, excluded)
    assert (found and found.cause) == cause
    if found:
        asked = f"ask for {left} in the config, " if left else ""
        spare = "or name a partition with spare nodes in the site file"
        assert (
            found.remedy == f"remove repaired nodes from {quarantine} (longhaul nodes --release NODE), {asked}{spare}"
        )


def test_without_a_quarantine_a_partition_or_an_answer_nothing_is_said(
    quarantine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert find_shortage("main", 9, tmp_path / "none.json") is None and find_shortage(None, 3, quarantine) is None
    monkeypatch.setattr(slurm_client, "partition_nodes", lambda partition: [])
    assert find_shortage("main", 3, quarantine) is None
    assert "ask for fewer nodes in the config" in shortage_remedy(quarantine)


def test_node_without_a_cause_or_in_a_damaged_list_is_named_alone(quarantine: Path):
    Quarantine([{"node": "n1"}, {"node": "n2", "cause": "down"}]).write(quarantine)
    assert quarantine_text(quarantine, ["n1", "n2", "n3"]) == "n1, n2 (down), n3"
    quarantine.write_text("{")
    assert quarantine_text(quarantine, ["n1"]) == "n1"


def test_job_needs_the_nodes_of_its_launch_spec(quarantine: Path, tmp_path: Path):
    spec = write_job(tmp_path, "").model_copy(update={"slurm": True, "nodes": 3, "quarantine": str(quarantine)})
    folder = Path(spec.folder)
    spec.write(folder / "launch.json")
    found = shortage_of_job(folder, "main")
    assert found and found.cause.startswith("3 nodes are needed")
    spec.model_copy(update={"slurm": False}).write(folder / "launch.json")
    assert shortage_of_job(folder, "main") is None
    (folder / "launch.json").write_text("{")
    assert shortage_of_job(folder, "main") is None
