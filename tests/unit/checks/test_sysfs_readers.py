"""RDMA ports, PCIe links, CPUs and memory are read from files in the kernel's form."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import pytest

from longhaul.checks.amd_gpu_reading import read_amd_gpus
from longhaul.checks.cpu_and_memory import read_cpu_and_memory
from longhaul.checks.infiniband_ports import has_peer_memory, rdma_driver, read_ports
from longhaul.checks.network_interfaces import read_interfaces
from longhaul.checks.pcie_links import read_pcie_links
from longhaul.checks.process_limits import read_process_limits
from tests.support.sysfs_tree import add_pcie_device, add_port, write_tree

ADAPTER, NVME, AMD_GPU, BRIDGE = "0x020700", "0x010802", "0x038000", "0x060400"


def test_ports_have_state_rate_errors_and_place(tmp_path: Path):
    add_port(tmp_path, "mlx5_0", address="0000:18:00.0", symbol_error=3, link_downed=1)
    add_port(tmp_path, "mlx5_1", state="1: DOWN", rate="10 Gb/sec (4X SDR)", address="0000:29:00.0")
    add_port(tmp_path, "mlx5_2", layer="Ethernet", rate="100 Gb/sec (4X EDR)", address="0000:3a:00.0")
    write_tree(tmp_path / "class" / "infiniband" / "mlx5_0", {"hca_type": "MT4129\n"})
    good, down, ethernet = read_ports(tmp_path)
    assert (good.adapter, down.adapter) == ("MT4129", "")
    assert (good.name, good.is_active, good.rate_gbit_per_s, good.pci_address, good.numa_node) == (
        "mlx5_0 port 1", True, 400.0, "0000:18:00.0", 0)  # fmt: skip
    assert good.errors == {"symbol_error": 3, "link_downed": 1} and down.errors == {}
    assert (down.state, down.is_active) == ("DOWN", False)
    assert (ethernet.link_layer, ethernet.rate_gbit_per_s) == ("Ethernet", 100.0)


def test_node_without_rdma_devices_has_no_ports(tmp_path: Path):
    assert read_ports(tmp_path) == []


def test_port_without_a_readable_rate_says_so(tmp_path: Path):
    add_port(tmp_path, "mlx5_0", rate="")
    (port,) = read_ports(tmp_path)
    assert port.rate_gbit_per_s is None and port.unavailable["rate_gbit_per_s"].endswith("ports/1/rate cannot be read")


def test_interfaces_have_state_rate_mtu_and_errors(tmp_path: Path):
    write_tree(tmp_path / "class" / "net", {
        "hsn0/operstate": "up", "hsn0/speed": 200000, "hsn0/mtu": 9000, "hsn0/statistics/rx_errors": 3,
        "hsn0/statistics/tx_errors": 0, "veth0/operstate": "unknown", "veth0/speed": -1, "veth0/mtu": 1500,
        "eth1/operstate": "down", "eth1/mtu": 1500, "lo/operstate": "unknown", "bonding_masters": "bond0",
    })  # fmt: skip
    device = tmp_path / "devices" / "0000:41:00.0"
    write_tree(device, {"vendor": "0x17db", "device": "0x0501"})
    (tmp_path / "class" / "net" / "hsn0" / "device").symlink_to(device)
    write_tree(tmp_path / "class" / "net" / "eth1" / "device", {"vendor": "0x15b3", "device": "0x1017"})
    down, slingshot, virtual = read_interfaces(tmp_path)
    assert [one.adapter for one in (down, slingshot, virtual)] == ["MT4119", "17db:0501", ""]
    assert [one.is_slingshot for one in (down, slingshot, virtual)] == [False, True, False]
    assert (slingshot.name, slingshot.state, slingshot.rate_gbit_per_s, slingshot.mtu) == (
        "hsn0",
        "ACTIVE",
        200.0,
        9000,
    )
    assert slingshot.errors == {"rx_errors": 3}
    assert (down.name, down.state, down.is_active) == ("eth1", "DOWN", False)
    assert (
        virtual.is_active
        and virtual.rate_gbit_per_s is None
        and "states no speed" in virtual.unavailable["rate_gbit_per_s"]
    )


def test_module_of_gpudirect_is_found(tmp_path: Path):
    assert not has_peer_memory(tmp_path)
    write_tree(tmp_path, {"module/nvidia_peermem/version": "580.95.05"})
    assert has_peer_memory(tmp_path) and rdma_driver(tmp_path) == ""
    write_tree(tmp_path, {"module/mlx5_core/version": "24.10-1.1.4"})
    assert rdma_driver(tmp_path) == "24.10-1.1.4"


def test_link_has_the_maximum_of_its_slower_end(tmp_path: Path):
    add_pcie_device(tmp_path, "0000:18:00.0", ADAPTER, max_speed="32.0 GT/s PCIe", bridge_speed="16.0 GT/s PCIe")
    add_pcie_device(tmp_path, "0000:29:00.0", AMD_GPU, width=8, speed="2.5 GT/s PCIe", vendor="0x1002")
    add_pcie_device(tmp_path, "0000:3a:00.0", NVME, speed="Unknown")
    add_pcie_device(tmp_path, "0000:4b:00.0", BRIDGE)
    adapter, gpu = read_pcie_links(tmp_path)
    assert (adapter.kind, adapter.speed, adapter.max_speed, adapter.width, adapter.max_width) == (
        "network adapter", 16.0, 16.0, 16, 16)  # fmt: skip
    assert (gpu.kind, gpu.vendor, gpu.speed, gpu.max_speed, gpu.width, gpu.max_width) == (
        "GPU",
        "0x1002",
        2.5,
        16.0,
        8,
        16,
    )
    assert read_pcie_links(tmp_path / "none") == []


def test_errors_of_amd_gpus_are_read_by_block(tmp_path: Path):
    """A node with two MI250X dies, and the driver's own files beside them."""
    driver = tmp_path / "bus" / "pci" / "drivers" / "amdgpu"
    for address, umc in (("0000:c1:00.0", "ue: 0\nce: 0\nde: 0"), ("0000:c6:00.0", "ue: 2\nce: 17\nde: 0")):
        write_tree(driver / address, {"vendor": "0x1002", "ras/umc_err_count": umc, "ras/gfx_err_count": "ue: 0\nce: 1",
                                      "ras/features": "feature mask: 0x1ff"})  # fmt: skip
    pages = "0x027f5d43 : 0x00001000 : R\n0x027f5d4b : 0x00001000 : R\n0x027f5f5b : 0x00001000 : P"
    write_tree(driver / "0000:c1:00.0", {"ras/gpu_vram_bad_pages": ""})
    write_tree(driver / "0000:c6:00.0", {"ras/gpu_vram_bad_pages": pages, "hwmon/hwmon5/power1_cap": 450000000,
                                         "hwmon/hwmon5/power1_cap_default": 560000000})  # fmt: skip
    write_tree(driver / "0000:d1:00.0", {"vendor": "0x1002", "hwmon/hwmon7/power1_cap": 0})
    write_tree(driver, {"new_id": "", "module/refcnt": 3})
    reading = read_amd_gpus(sys=tmp_path)
    good, bad, plain = reading.gpus
    assert (reading.source, reading.error) == ("files of the driver amdgpu", "the package amdsmi is not installed")
    assert (good.address, good.uncorrected, good.corrected) == ("0000:c1:00.0", {}, {"gfx": 1})
    assert (bad.uncorrected, bad.corrected) == ({"umc": 2}, {"gfx": 1, "umc": 17})
    assert (good.bad_pages, bad.bad_pages, plain.bad_pages) == ({}, {"R": 2, "P": 1}, None)
    assert (bad.power_limit_w, bad.power_limit_default_w) == (450.0, 560.0)
    assert good.power_limit_w is None and plain.power_limit_w == 0
    assert plain.unavailable["uncorrected"] == "the driver amdgpu has no counters"
    assert read_amd_gpus(sys=tmp_path / "none").gpus == []


def test_cpu_and_memory_are_read(tmp_path: Path):
    write_tree(tmp_path, {
        "devices/system/node/node0/cpulist": "0-1", "devices/system/node/node1/cpulist": "2-3",
        **{f"devices/system/cpu/cpu{core}/cpufreq/scaling_governor": "performance" for core in range(3)},
        "devices/system/cpu/cpu3/cpufreq/scaling_governor": "powersave",
        "kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
        "devices/system/edac/mc/mc0/dimm0/size": 65536, "devices/system/edac/mc/mc1/dimm0/size": 32768,
        "devices/system/edac/mc/mc0/ue_count": 1, "devices/system/edac/mc/mc1/ue_count": 2,
        "devices/system/edac/mc/mc0/ce_count": 0,
    })  # fmt: skip
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9654 96-Core Processor\n\nprocessor\t: 1\n")
    facts = read_cpu_and_memory(tmp_path, cpuinfo)
    assert (facts.model, facts.numa_nodes) == ("AMD EPYC 9654 96-Core Processor", 2)
    assert facts.governors == {"performance": 3, "powersave": 1} and facts.huge_pages == "madvise"
    assert facts.modules_mib == [65536, 32768] and (facts.memory_uncorrected, facts.memory_corrected) == (3, 0)
    assert facts.unavailable == {}


def test_what_a_virtual_machine_lacks_is_named(tmp_path: Path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n")
    facts = read_cpu_and_memory(tmp_path, tmp_path / "cpuinfo")
    assert facts.model == "Arm implementer 0x41, part 0xd4f" and facts.governors is None and facts.modules_mib is None
    assert facts.unavailable["governors"].startswith("the kernel does not set the frequency")
    assert facts.unavailable["memory_uncorrected"] == "no EDAC driver is loaded"


def test_counters_that_cannot_be_read_are_unknown(tmp_path: Path):
    """Some kernels let only root read them; a module of an empty slot may have no size."""
    write_tree(tmp_path, {f"devices/system/edac/mc/mc0/{name}": "" for name in ("ue_count", "ce_count", "dimm0/size")})
    facts = read_cpu_and_memory(tmp_path, tmp_path / "cpuinfo")
    assert facts.memory_uncorrected is facts.memory_corrected is facts.modules_mib is None
    assert facts.unavailable["memory_uncorrected"].endswith("edac/mc cannot be read")


def test_this_machine_is_read():
    facts = read_cpu_and_memory()
    assert facts.model and len(facts.unavailable) < 7
    assert sum((facts.governors or {"unknown": 1}).values()) <= (psutil.cpu_count() or 0)


def test_limits_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch):
    limits = {resource.RLIMIT_NOFILE: (1024, 2048), resource.RLIMIT_NPROC: (resource.RLIM_INFINITY,) * 2,
              resource.RLIMIT_MEMLOCK: (65536, 65536)}  # fmt: skip
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    found = read_process_limits()
    assert (found.open_files, found.processes) == (1024, None)
    monkeypatch.setattr(Path, "read_text", lambda path: "CapEff:\t00000000a80425fb\n")  # without bit 14, CAP_IPC_LOCK
    assert read_process_limits().locked_bytes == 65536
    monkeypatch.setattr(Path, "read_text", lambda path: "CapEff:\t000001ffffffffff\n")
    assert read_process_limits().locked_bytes is None
