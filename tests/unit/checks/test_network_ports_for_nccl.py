"""The network of a node is that of the ports that NCCL uses, at most one per rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.checks.network_ports_for_nccl import NodeNetwork, read_node_network, slowest_network
from tests.support.sysfs_tree import add_pcie_device, add_port, write_tree

NDR, HDR = "400 Gb/sec (4X NDR)", "200 Gb/sec (4X HDR)"


def add_ports(root: Path, rates: list[str], layer: str = "InfiniBand", first: int = 0) -> Path:
    for number, rate in enumerate(rates, first):
        add_port(root, f"mlx5_{number}", rate=rate, layer=layer, address=f"0000:{number + 16:02x}:00.0")
    return root


def test_compute_ports_count_and_slower_ones_of_the_storage_do_not(tmp_path: Path):
    add_ports(tmp_path, [NDR] * 8 + [HDR])
    add_ports(tmp_path, [NDR], "Ethernet", first=9)
    add_port(tmp_path, "mlx5_10", state="1: DOWN", address="0000:40:00.0")
    found = read_node_network("infiniband", 8, sys=tmp_path)
    assert found and found == NodeNetwork("InfiniBand", 8, 400.0) and (found.gb_per_s, found.port_gb_per_s) == (400, 50)
    assert str(found) == "8 x 400 Gbit/s InfiniBand"
    assert read_node_network("infiniband", 4, sys=tmp_path) == NodeNetwork("InfiniBand", 4, 400.0), "one per rank"
    assert read_node_network("roce", 8, sys=tmp_path) == NodeNetwork("RoCE", 1, 400.0)
    assert read_node_network("ethernet", 8, sys=tmp_path) is None, "sockets"


@pytest.mark.parametrize(
    ("hca", "ports"),
    [
        ("", 12),
        ("mlx5_0,mlx5_2", 2),
        ("mlx5_1", 3),  # also mlx5_10 and mlx5_11
        ("=mlx5_1", 1),
        ("=mlx5_1:1,mlx5_2:2", 1),
        ("^mlx5_0", 11),
        ("^=mlx5_1:1", 11),
    ],
)
def test_ports_are_those_that_nccl_ib_hca_allows(tmp_path: Path, hca: str, ports: int):
    found = read_node_network("infiniband", 16, hca, add_ports(tmp_path, [NDR] * 12))
    assert found and found.ports == ports


def test_slingshot_interfaces_are_counted(tmp_path: Path):
    files = {
        f"hsn{number}/{name}": value for number in range(4) for name, value in (("operstate", "up"), ("speed", 200000))
    }
    write_tree(tmp_path / "class" / "net", {**files, "eth0/operstate": "up", "eth0/speed": 400000})
    assert read_node_network("ethernet", 8, sys=tmp_path) == NodeNetwork("Slingshot", 4, 200.0)


def add_gpus(root: Path, number: int) -> Path:
    for index in range(number):
        add_pcie_device(root, f"0000:{0xA0 + index:02x}:00.0", "0x030200", vendor="0x10de")
    return root


@pytest.mark.parametrize(
    ("ports", "ranks", "gpus", "used"),
    [
        (8, 8, 8, 8),
        (8, 4, 8, 4),
        (4, 4, 8, 2),
        (4, 2, 8, 1),
        (2, 1, 8, 1),
        (1, 8, 8, 1),
        (4, 4, 0, 4),  # a container without /sys of the GPUs
        (8, 8, 4, 8),  # more ranks than GPUs
    ],
)
def test_job_with_a_part_of_the_gpus_has_that_part_of_the_ports(
    tmp_path: Path, ports: int, ranks: int, gpus: int, used: int
):
    add_gpus(add_ports(tmp_path, [NDR] * ports), gpus)
    add_pcie_device(tmp_path, "0000:f0:00.0", "0x030000", vendor="0x1a03")  # the screen of the node's controller
    found = read_node_network("infiniband", ranks, sys=tmp_path)
    assert found == NodeNetwork("InfiniBand", used, 400.0)


@pytest.mark.parametrize(
    ("rate", "speed", "ports", "port_rate"),
    [
        (HDR, "16.0 GT/s PCIe", 1, 200.0),  # two of 200 Gbit/s share 252
        (HDR, "32.0 GT/s PCIe", 2, 200.0),
        (NDR, "16.0 GT/s PCIe", 1, 252.06),
        (HDR, "5.0 GT/s PCIe", 1, 64.0),
    ],
)
def test_ports_of_one_device_share_its_slot(tmp_path: Path, rate: str, speed: str, ports: int, port_rate: float):
    for function in range(2):
        address = f"0000:18:00.{function}"
        add_port(tmp_path, f"mlx5_{function}", rate=rate, address=address)
        add_pcie_device(tmp_path, address, "0x020700", max_speed=speed, bridge_speed="32.0 GT/s PCIe")
    found = read_node_network("infiniband", 8, sys=tmp_path)
    assert found and (found.ports, found.port_gbit_per_s) == (ports, pytest.approx(port_rate, abs=0.01))


def test_virtual_functions_are_no_ports(tmp_path: Path):
    add_ports(tmp_path, [NDR] * 3)
    for number in (1, 2):
        device = tmp_path / "class" / "infiniband" / f"mlx5_{number}" / "device"
        (device / "physfn").symlink_to("../0000:10:00.0")
    assert read_node_network("infiniband", 8, sys=tmp_path) == NodeNetwork("InfiniBand", 1, 400.0)


def test_the_slowest_node_counts_and_an_unknown_one_makes_all_unknown():
    fast, slow = NodeNetwork("InfiniBand", 8, 400.0), NodeNetwork("InfiniBand", 7, 400.0)
    assert (
        slowest_network([fast, slow]) == slow and slowest_network([fast, None]) is None and slowest_network([]) is None
    )
