"""Variables about adapters and GIDs are set only where NCCL's own choice would fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.runtime import rdma_variables as rdma
from longhaul.runtime.rdma_variables import RdmaPort, active_ports, rdma_variables, set_rdma_variables

IB = [RdmaPort("mlx5_0", 1, "InfiniBand"), RdmaPort("mlx5_10", 1, "InfiniBand")]
ROCE = [RdmaPort("mlx5_2", 1, "Ethernet", 3)]
NEW, OLD = (2, 28, 9), (2, 20, 5)


def port(devices: Path, name: str, state: str, layer: str, gids: dict[int, tuple[str, str]] | None = None) -> None:
    """Write the files of a port as the kernel shows them; gids: index -> (type, GID)."""
    folder = devices / name / "ports" / "1"
    (folder / "gid_attrs" / "types").mkdir(parents=True)
    (folder / "gids").mkdir()
    (folder / "state").write_text(f"{state}\n")
    (folder / "link_layer").write_text(f"{layer}\n")
    for index, (kind, gid) in (gids or {}).items():
        (folder / "gid_attrs" / "types" / str(index)).write_text(f"{kind}\n")
        (folder / "gids" / str(index)).write_text(f"{gid}\n")


def test_active_ports_of_a_node_are_read(tmp_path: Path):
    local, ipv4 = "fe80:0000:0000:0000:0ac0:ebff:fe12:3456", "0000:0000:0000:0000:0000:ffff:0a00:0102"
    gids = {0: ("IB/RoCE v1", local), 1: ("RoCE v2", local), 2: ("IB/RoCE v1", ipv4), 3: ("RoCE v2", ipv4)}
    port(tmp_path, "mlx5_0", "4: ACTIVE", "InfiniBand")
    port(tmp_path, "mlx5_1", "1: DOWN", "InfiniBand")
    port(tmp_path, "mlx5_2", "4: ACTIVE", "Ethernet", gids)
    assert active_ports(tmp_path) == [IB[0], ROCE[0]]
    assert active_ports(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("kind", "ports", "nccl", "expected"),
    [
        ("infiniband", [*IB, *ROCE], NEW, {"NCCL_IB_HCA": "=mlx5_0:1,mlx5_10:1"}),
        ("infiniband", IB, NEW, {}),
        ("infiniband", [], NEW, {}),
        ("infiniband", ROCE, NEW, {}),
        ("roce", [*IB, *ROCE], NEW, {"NCCL_IB_HCA": "=mlx5_2:1"}),
        ("roce", ROCE, OLD, {"NCCL_IB_GID_INDEX": "3"}),
        ("roce", ROCE, NEW, {}),
        ("roce", [*ROCE, RdmaPort("mlx5_3", 1, "Ethernet", 5)], OLD, {}),
        ("roce", [RdmaPort("mlx5_3", 1, "Ethernet")], OLD, {}),
        ("ethernet", [*IB, *ROCE], OLD, {}),
        ("", [*IB, *ROCE], OLD, {}),
    ],
)
def test_variables_follow_from_the_ports(
    kind: str, ports: list[RdmaPort], nccl: tuple[int, ...], expected: dict[str, str]
):
    assert {name: value for name, (value, _) in rdma_variables(kind, ports, nccl).items()} == expected


def test_variable_that_is_set_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rdma, "active_ports", lambda: [*IB, *ROCE])
    environ = {rdma.INTERCONNECT: "infiniband", "NCCL_IB_HCA": "mlx5"}
    (line,) = set_rdma_variables(NEW, environ)
    assert environ["NCCL_IB_HCA"] == "mlx5" and line.startswith("NCCL_IB_HCA stays mlx5, as it was set")
    del environ["NCCL_IB_HCA"]
    (line,) = set_rdma_variables(NEW, environ)
    assert environ["NCCL_IB_HCA"] == "=mlx5_0:1,mlx5_10:1" and "2 of 3 active ports are InfiniBand" in line
