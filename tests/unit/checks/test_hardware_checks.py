"""Each fault of one of four nodes gives one finding with node, component, value and expected value; healthy nodes give none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.node_check_row import CheckRow
from longhaul.checks.amd_gpu_facts import AmdGpuFacts, AmdReading
from longhaul.checks.build_check_rows import print_checks, problem_lines, warning_lines
from longhaul.checks.gpu_labels import gpu_name
from longhaul.checks.hardware_checks import hardware_rows
from longhaul.checks.hardware_facts import HardwareFacts
from longhaul.checks.kernel_log import KernelError, KernelLog
from longhaul.checks.nvidia_gpu_checks import kernel_log_rows
from longhaul.checks.nvidia_gpu_facts import GpuReading
from longhaul.checks.process_limits import ProcessLimits
from longhaul.config.node_minimums import NodeMinimums
from tests.support.healthy_node_facts import (
    GPU_LINKS,
    HEALTHY_CORES,
    environment_job,
    gpu,
    hardware,
    interface,
    link,
    port,
)


def nodes(*bad: HardwareFacts, count: int = 4) -> list[dict[str, Any]]:
    """Return the facts of `count` nodes, the last of which have the given hardware."""
    found = [*[hardware()] * (count - len(bad)), *bad]
    return [
        {
            "host": f"n{number}",
            "hardware": facts,
            "gpus": [],
            "cpus": 96,
            "measured": None,
            "core_speed": HEALTHY_CORES,
            "run_folder_seen_after_s": 0.1,
            "own_file_seen_after_s": 0.1,
        }
        for number, facts in enumerate(found, start=1)
    ]


def bad(rows: list[CheckRow]) -> list[CheckRow]:
    return [row for row in rows if row["result"] != "ok"]


def test_healthy_nodes_have_only_rows_that_are_ok(capsys: pytest.CaptureFixture[str]):
    rows = hardware_rows(nodes(), environment_job())
    assert bad(rows) == [] and len(rows) > 50
    assert problem_lines(rows) == warning_lines(rows) == []
    ecc = next(row for row in rows if row["check"] == "uncorrectable ECC errors" and row["node"] == "n3")
    names = (gpu_name(index, gpu(index).pci_address) for index in range(8))
    assert ecc["component"] == ", ".join(names) and ecc["expected"] == "0"
    print_checks(rows)
    assert capsys.readouterr().out == f"hardware checks: {len(rows)} ok, 0 warn, 0 fail, 0 unknown\n"


XID = KernelError("Xid", 79, "0000:3b:00", 2, "GPU has fallen off the bus.")
FAULTS: dict[str, tuple[HardwareFacts, str, str]] = {
    "GPU off the bus": (
        hardware(kernel_log=KernelLog([XID])), "fail",
        "n4: GPU 2 (PCI 0000:3b:00.0): kernel log: Xid 79, 2 times, the GPU has fallen off the bus: GPU has fallen off"),
    "error of the application": (
        hardware(kernel_log=KernelLog([KernelError("Xid", 31, "0000:3b:00", 1, "MMU Fault")])), "warn",
        "n4: GPU 2 (PCI 0000:3b:00.0): kernel log: Xid 31, 1 times: MMU Fault, expected no Xid or SXid errors"),
    "row that is already remapped": (
        hardware(kernel_log=KernelLog([KernelError("Xid", 63, "0000:3b:00", 1, "Row Remapper")])), "warn",
        "n4: GPU 2 (PCI 0000:3b:00.0): kernel log: Xid 63"),
    "switch": (
        hardware(kernel_log=KernelLog([KernelError("SXid", 20034, "0000:05:00.0", 1, "Fatal, Link 32 LTSSM Fault Up")])),
        "fail", "n4: PCI 0000:05:00.0: kernel log: SXid 20034, 1 times: Fatal, Link 32"),
    "switch, not fatal": (
        hardware(kernel_log=KernelLog([KernelError("SXid", 12028, "0000:05:00.0", 1, "Non-fatal, Link 32")])), "warn",
        "SXid 12028"),
    "slow port": (
        hardware(ports=[port(0), port(1), port(2, rate_gbit_per_s=200.0), port(3)]), "fail",
        "n4: mlx5_2 port 1: port rate: 200 Gbit/s, expected 400 Gbit/s, as on the other nodes"),
    "port errors": (
        hardware(ports=[port(0, errors={"symbol_error": 5}), port(1), port(2), port(3)]), "warn",
        "n4: mlx5_0 port 1: port errors: symbol_error 5, expected 0"),
    "narrow adapter": (
        hardware(pcie_links=[link(width=8), *GPU_LINKS]), "fail",
        "n4: network adapter 0000:18:00.0: PCIe link: 32 GT/s x8, expected 32 GT/s x16, as on another node; let"),
    "slow disk link": (
        hardware(pcie_links=[link("0000:90:00.0", "NVMe disk", speed=8.0, width=4, max_width=4), *GPU_LINKS]), "warn",
        "n4: NVMe disk 0000:90:00.0: PCIe link: 8 GT/s x4, expected 32 GT/s x4"),
    "interface down": (
        hardware(interfaces=[interface(state="DOWN")]), "fail", "n4: ib0: port state: DOWN, expected ACTIVE, as on the other"),
    "interface of another MTU": (
        hardware(interfaces=[interface(mtu=2044)]), "warn", "n4: MTU of ib0: 2044, expected 4092; ask the admins"),
    "another OFED": (
        hardware(rdma_driver="23.10"), "warn", "n4: RDMA driver (OFED): 23.10, expected 24.10-1.1.4; ask the admins"),
    "memory error": (
        hardware(cpu={"memory_uncorrected": 1}), "fail", "n4: uncorrectable memory errors: 1, expected 0; drain the node"),
    "corrected memory errors": (hardware(cpu={"memory_corrected": 9}), "warn", "n4: corrected memory errors: 9"),
    "governor": (
        hardware(cpu={"governors": {"performance": 100, "powersave": 12}}), "warn",
        "n4: frequency governor: performance on 100 cores, powersave on 12 cores, expected performance; set it: cpupower"),
    "huge pages": (hardware(cpu={"huge_pages": "never"}), "warn", "n4: transparent huge pages: never, expected always"),
    "another CPU": (hardware(cpu={"model": "Intel 6338"}), "warn", "n4: CPU model: Intel 6338, expected Intel(R) Xeon(R)"),
    "another number of NUMA nodes": (
        hardware(cpu={"numa_nodes": 8}), "warn", "n4: NUMA nodes: 8, expected 2; ask the admins whether the nodes"),
    "lost memory module": (
        hardware(cpu={"modules_mib": [65536] * 15}), "warn", "n4: memory modules: 15 x 65536 MiB, expected 16 x 65536 MiB"),
    "locked memory": (
        hardware(limits=ProcessLimits(1_048_576, None, 65536)), "fail",
        "n4: locked memory (ulimit -l): 65,536, expected unlimited; let the admins remove the limit"),
    "some locked memory": (hardware(limits=ProcessLimits(1_048_576, None, 2**30)), "warn", "locked memory (ulimit -l)"),
    "open files": (
        hardware(limits=ProcessLimits(1024, 4096, None)), "warn", "n4: open files (ulimit -n): 1,024, expected >= 4096"),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "result", "message"), FAULTS.values(), ids=FAULTS)
def test_fault_is_named_once_with_its_component(facts: HardwareFacts, result: str, message: str):
    rows = hardware_rows(nodes(facts), environment_job())
    found = bad(rows)
    assert [(row["node"], row["result"]) for row in found] == [("n4", result)], found
    lines = problem_lines(rows) if result == "fail" else warning_lines(rows)
    assert len(lines) == 1 and message in lines[0], lines


@pytest.mark.parametrize(
    ("ports", "name", "state"),
    [
        ([port(0), port(1, state="DOWN"), port(2), port(3)], "mlx5_1 port 1", "DOWN"),
        ([port(0), port(1), port(2)], "mlx5_3 port 1", "missing"),
    ],
)
def test_lost_port_is_named_and_so_are_the_gpus_without_one_beside_them(ports: list[Any], name: str, state: str):
    rows = hardware_rows(nodes(hardware(ports=ports)), environment_job())
    (line,) = problem_lines(rows)
    assert line.startswith(
        f"n4: {name}: port state: {state}, expected ACTIVE, as on the other nodes; let the admins check"
    )
    (line,) = warning_lines(rows)
    assert line.startswith(
        "n4: adapters next to GPUs: NUMA node 0: 4 GPUs, 2 ports, NUMA node 1: 4 GPUs, 1 ports, expected"
    )
    assert len(bad(rows)) == 2


OFF_THE_BUS = KernelLog([KernelError("Xid", 79, "0000:99:00", 1, "off the bus")])


def test_error_of_a_gpu_that_the_job_does_not_use_is_a_warning():
    (row,) = kernel_log_rows("n4", OFF_THE_BUS, GpuReading([gpu(0)]), 1)
    assert (row["component"], row["result"]) == ("PCI 0000:99:00.0", "warn")
    assert row["value"] == "Xid 79, 1 times, the GPU has fallen off the bus: off the bus"
    assert row["remedy"] == "tell the admins; this job does not use the GPU"


@pytest.mark.parametrize(("reading", "gpus"), [(GpuReading([], "no NVML"), 1), (GpuReading([gpu(0)]), 2)])
def test_error_of_a_gpu_that_does_not_answer_fails(reading: GpuReading, gpus: int):
    """It may be the job's own, as fewer GPUs answer than the job needs."""
    (row,) = kernel_log_rows("n4", OFF_THE_BUS, reading, gpus)
    assert (row["component"], row["result"]) == ("PCI 0000:99:00.0", "fail")


def test_row_that_waits_for_a_reset_fails():
    reading = GpuReading([gpu(0, remapping_pending=True)])
    (row,) = kernel_log_rows("n4", KernelLog([KernelError("Xid", 63, "0000:1b:00", 1, "Row Remapper")]), reading, 1)
    assert row["result"] == "fail" and row["component"] == "GPU 0 (PCI 0000:1b:00.0)"
    assert row["value"] == "Xid 63, 1 times, a memory row is marked for remapping: Row Remapper"


UNKNOWN: dict[str, tuple[HardwareFacts, str]] = {
    "NVML": (hardware(gpus=GpuReading([], "NVML: NVML Shared Library Not Found")), "NVML Shared Library Not Found"),
    "kernel log": (hardware(kernel_log=KernelLog([], "/dev/kmsg: Operation not permitted")), "Operation not permitted"),
    "memory modules": (
        hardware(cpu={"modules_mib": None, "unavailable": {"modules_mib": "no EDAC driver is loaded"}}), "no EDAC driver"),
    "NUMA nodes": (hardware(cpu={"numa_nodes": None, "unavailable": {"numa_nodes": "no NUMA nodes"}}), "no NUMA nodes"),
    "CPU model": (hardware(cpu={"model": None, "unavailable": {"model": "no name"}}), "no name"),
    "RDMA driver": (hardware(rdma_driver=""), "there is no /sys/module/mlx5_core/version"),
    "NUMA node of ports": (
        hardware(ports=[port(number, numa_node=None) for number in range(4)]), "no NUMA node of any active RDMA port"),
    "NUMA node of GPUs": (hardware(pcie_links=[link()]), "no NUMA node of any GPU"),
    "paths": (hardware(gpus=GpuReading([gpu(index, paths={}) for index in range(8)])), "NVML states no path"),
    "MTU": (hardware(interfaces=[interface(mtu=None)]), "/sys/class/net/ib0/mtu cannot be read"),
    "GPUDirect": (hardware(peer_memory=False), "the module nvidia_peermem is not loaded"),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "reason"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_a_node_does_not_tell_is_unknown_with_a_reason(facts: HardwareFacts, reason: str):
    rows = hardware_rows(nodes(facts), environment_job())
    (row,) = bad(rows)
    assert (
        row["result"] == "unknown"
        and row["value"].startswith("not available: ")
        and reason in row["value"]
        and row["node"] == "n4"
    )
    assert problem_lines(rows) == warning_lines(rows) == []


def test_what_no_node_tells_is_unknown_on_all_of_them():
    found = nodes(*[hardware(rdma_driver="")] * 4)
    rows = bad(hardware_rows(found, environment_job()))
    assert [(row["node"], row["result"], row["expected"]) for row in rows] == [
        (f"n{number}", "unknown", "the same on all nodes") for number in range(1, 5)
    ]
    assert bad(hardware_rows(found, environment_job(interconnect="ethernet"))) == [], "nothing uses this driver"


def test_node_with_fewer_cores_is_named():
    found = nodes()
    found[1]["cpus"] = 95
    assert warning_lines(hardware_rows(found, environment_job())) == [
        "n2: cores of the job: 95, expected 96; ask the admins whether the nodes of this partition should be equal"
    ]


def test_nvlinks_matter_only_between_gpus():
    facts = hardware(gpus=GpuReading([gpu(0, nvlinks=0, nvlinks_down=list(range(18)))]))
    assert bad(hardware_rows(nodes(facts, count=1), environment_job()))[0]["check"] == "NVLinks"
    assert bad(hardware_rows(nodes(facts, count=1), environment_job(gpus_per_node=1))) == []


def test_port_that_is_down_everywhere_is_not_in_use():
    unused = [port(0), port(1), port(2), port(3, state="DOWN", rate_gbit_per_s=10.0)]
    found = nodes(*[hardware(ports=unused)] * 4)
    assert bad(hardware_rows(found, environment_job())) == []


def test_slingshot_is_judged_by_its_interfaces():
    def slingshot(*rates: float) -> HardwareFacts:
        found = [interface(f"hsn{number}", rate_gbit_per_s=rate, mtu=9000) for number, rate in enumerate(rates)]
        return hardware(ports=[], interfaces=[*found, interface("eth0", state="DOWN")])

    spec = environment_job(interconnect="ethernet", socket_interface=None)
    found = nodes(*[slingshot(200.0, 200.0)] * 3, slingshot(200.0, 100.0))
    assert problem_lines(hardware_rows(found, spec))[0].startswith(
        "n4: hsn1: port rate: 100 Gbit/s, expected 200 Gbit/s, as on the other nodes; let the admins check cable"
    )
    minimum = environment_job(interconnect="ethernet", minimums=NodeMinimums(port_gbit_per_s=400))
    assert "expected 400 Gbit/s, node_minimums" in problem_lines(hardware_rows(found, minimum))[0]


@pytest.mark.parametrize(
    ("adapter", "rate", "expected"),
    [
        ("17db:0501", 100.0, "200 Gbit/s, the highest rate of a Cassini (Slingshot 11)"),
        ("1590:0371", 200.0, "400 Gbit/s, the highest rate of a Cassini 2 (Slingshot 400)"),
        ("MT4119", 50.0, "100 Gbit/s, the highest rate of a ConnectX-5"),
        ("17db:0501", 200.0, ""),
        ("MT4119", 100.0, ""),
        ("", 100.0, ""),
    ],
)
def test_slingshot_below_its_card_is_a_warning_on_equal_nodes(adapter: str, rate: float, expected: str):
    """The interface of sockets may be a slow port of the same card. With RoCE, the RDMA port has the row."""
    hsn = [interface(f"hsn{number}", rate_gbit_per_s=rate, adapter=adapter) for number in range(4)]
    facts = hardware(ports=[], interfaces=[*hsn, interface("eth0", rate_gbit_per_s=25.0, adapter="MT4119")])
    spec = environment_job(interconnect="ethernet", socket_interface="eth0")
    lines = warning_lines(hardware_rows(nodes(*[facts] * 4), spec))
    assert len(lines) == bool(expected)
    if expected:
        assert f"port rate: {rate:g} Gbit/s, expected {expected}; let the admins check cable" in lines[0]
        assert "hsn0" in lines[0] and "eth0" not in lines[0]
    minimum = environment_job(interconnect="ethernet", minimums=NodeMinimums(port_gbit_per_s=rate))
    assert warning_lines(hardware_rows(nodes(*[facts] * 4), minimum)) == [], (
        "the site file says that this rate is right"
    )
    roce = environment_job(interconnect="roce", socket_interface="hsn0")
    assert not any("port rate" in line for line in warning_lines(hardware_rows(nodes(*[facts] * 4), roce)))


def test_rate_of_the_site_file_replaces_that_of_the_other_nodes():
    spec = environment_job(minimums=NodeMinimums(port_gbit_per_s=800))
    (line,) = problem_lines(hardware_rows(nodes(), spec))
    assert line.startswith("n1: mlx5_0 port 1, n1: mlx5_1 port 1, ")
    assert "n4: mlx5_3 port 1: port rate: 400 Gbit/s, expected 800 Gbit/s, node_minimums of the site file" in line


@pytest.mark.parametrize(
    ("adapter", "rate", "expected"),
    [
        ("MT4131", 400.0, "800 Gbit/s, the highest rate of a ConnectX-8"),
        ("MT4129", 200.0, "400 Gbit/s, the highest rate of a ConnectX-7"),
        ("MT4123", 100.0, "200 Gbit/s, the highest rate of a ConnectX-6"),
        ("MT41692", 200.0, "400 Gbit/s, the highest rate of a BlueField-3"),
        ("MT41692", 400.0, ""),
        ("MT4125", 100.0, ""),  # the usual rate of a ConnectX-6 Dx, not its highest
        ("MT4119", 25.0, "100 Gbit/s, the highest rate of a ConnectX-5"),
        ("MT4123", 200.0, ""),
        ("", 10.0, ""),
        ("MT9999", 10.0, ""),
    ],
)
@pytest.mark.parametrize("interconnect", ["infiniband", "roce"])
def test_rate_below_that_of_the_adapter_is_a_warning_on_equal_nodes(
    interconnect: str, adapter: str, rate: float, expected: str
):
    layer = "Ethernet" if interconnect == "roce" else "InfiniBand"
    ports = [port(number, adapter=adapter, rate_gbit_per_s=rate, link_layer=layer) for number in range(4)]
    found = nodes(*[hardware(ports=ports)] * 4)
    rows = hardware_rows(found, environment_job(interconnect=interconnect))
    lines = warning_lines(rows)
    assert len(lines) == bool(expected) and problem_lines(rows) == []
    if expected:
        assert f"port rate: {rate:g} Gbit/s, expected {expected}; let the admins check cable" in lines[0]
        assert lines[0].endswith("set node_minimums.port_gbit_per_s of the site file to it")
    own_rate = environment_job(interconnect=interconnect, minimums=NodeMinimums(port_gbit_per_s=rate))
    assert bad(hardware_rows(found, own_rate)) == [], "the site file says that this rate is right"


def test_ports_matter_only_for_rdma_between_nodes():
    down = hardware(ports=[port(0, state="DOWN")], limits=ProcessLimits(1_048_576, None, 65536), peer_memory=False)
    assert bad(hardware_rows(nodes(down), environment_job(interconnect="ethernet"))) == []
    assert bad(hardware_rows(nodes(down, count=1), environment_job())) == []
    assert bad(hardware_rows(nodes(down), environment_job(interconnect="roce"))), "locked memory"


def test_amd_gpus_are_judged_by_the_width_of_their_links():
    """NVML says nothing about them, and the kernel states their links. An idle one lowers its speed."""

    def amd(**changes: Any) -> HardwareFacts:
        links = [link("0000:c1:00.0", "GPU", vendor="0x1002", speed=2.5), link("0000:c6:00.0", "GPU", **changes)]
        return hardware(gpus=GpuReading([], "NVML: NVML Shared Library Not Found"), pcie_links=links)

    spec = environment_job(build="rocm 6.4", interconnect="ethernet")
    assert problem_lines(hardware_rows(nodes(*[amd()] * 4), spec)) == []
    rows = hardware_rows(nodes(amd(), amd(), amd(), amd(width=8)), spec)
    assert problem_lines(rows)[0].startswith("n4: GPU 0000:c6:00.0: PCIe link: 32 GT/s x8, expected 32 GT/s x16, as on")


def test_link_that_is_narrow_on_all_nodes_may_be_built_like_that():
    """An adapter for two sockets has half of the lanes on each of them."""
    found = nodes(*[hardware(pcie_links=[link(width=8), *GPU_LINKS])] * 4)
    rows = hardware_rows(found, environment_job())
    assert problem_lines(rows) == []
    assert warning_lines(rows)[0].startswith("n1: network adapter 0000:18:00.0, n2: ")
    assert "PCIe link: 32 GT/s x8, expected 32 GT/s x16; let the admins reseat" in warning_lines(rows)[0]


def test_node_whose_gpus_are_far_from_the_adapters_is_named():
    def placed(*ports: int) -> HardwareFacts:
        gpus = [link(f"0000:{index:02x}:00.0", "GPU", numa_node=index % 2) for index in range(4)]
        return hardware(pcie_links=gpus, ports=[port(number, numa_node=node) for number, node in enumerate(ports)])

    rows = hardware_rows(nodes(*[placed(0, 0, 1, 1)] * 3, placed(0, 0, 0, 0)), environment_job())
    assert warning_lines(rows)[0].startswith(
        "n4: adapters next to GPUs: NUMA node 0: 2 GPUs, 4 ports, NUMA node 1: 2 GPUs, 0 ports, expected NUMA node 0: 2 GPUs, 2"
    )


def test_amd_node_with_other_links_between_its_gpus_is_named():
    def wired(path: str) -> HardwareFacts:
        gpus = [AmdGpuFacts("0000:c1:00.0"), AmdGpuFacts("0000:c6:00.0", paths={"0000:c1:00.0": path} if path else {})]
        return hardware(gpus=GpuReading([], "NVML: NVML Shared Library Not Found"), amd_gpus=AmdReading(gpus))

    found = nodes(wired("XGMI 200 GB/s"), wired("XGMI 200 GB/s"), wired("XGMI 50 GB/s"), wired(""))
    rows = hardware_rows(found, environment_job(build="rocm 6.4", interconnect="ethernet"))
    paths = [(row["value"], row["result"]) for row in rows if row["check"] == "paths between GPUs"]
    assert paths == [
        ("1 XGMI 200 GB/s", "ok"),
        ("1 XGMI 200 GB/s", "ok"),
        ("1 XGMI 50 GB/s", "warn"),
        ("not available: amdsmi states no path between the GPUs", "unknown"),
    ]


def test_node_with_other_paths_between_its_gpus_is_named():
    def wired(*paths: str) -> HardwareFacts:
        """Return a node of three GPUs. paths: between GPU 0 and 1, 0 and 2, 1 and 2; "" if NVML does not know it."""
        between = dict(zip(((0, 1), (0, 2), (1, 2)), paths, strict=True))
        known = [(*pair, path) for pair, path in between.items() if path]
        known += [(second, first, path) for first, second, path in known]
        gpus = [gpu(index, paths={f"GPU-{b}": path for a, b, path in known if a == index}) for index in range(3)]
        return hardware(gpus=GpuReading(gpus))

    spec = environment_job(gpus_per_node=3)
    rows = hardware_rows(nodes(*[wired("NODE", "SYS", "SYS")] * 3, wired("SYS", "SYS", "SYS")), spec)
    (line,) = (line for line in warning_lines(rows) if "paths" in line)
    assert line.startswith("n4: paths between GPUs: 3 SYS, expected 1 NODE, 2 SYS; ask the admins")
    rows = hardware_rows(nodes(*[wired("NODE", "SYS", "SYS")] * 3, wired("", "", "")), spec)
    found = [row["result"] for row in rows if row["check"] == "paths between GPUs"]
    assert found == ["ok", "ok", "ok", "unknown"]


def test_cpu_nodes_have_no_gpu_rows():
    rows = hardware_rows(
        nodes(hardware(cpu={"governors": {"powersave": 8}})), environment_job(build="cpu", interconnect="ethernet")
    )
    assert bad(rows) == [] and not any("ECC" in row["check"] for row in rows)


def test_same_warning_of_many_nodes_is_one_line():
    found = nodes(*[hardware(cpu={"huge_pages": "never"})] * 8, count=8)
    assert warning_lines(hardware_rows(found, environment_job())) == [
        "n1, n2, n3, n4 and 4 others: transparent huge pages: never, expected always or madvise; enable them in "
        "/sys/kernel/mm/transparent_hugepage/enabled"
    ]


def test_values_that_differ_stand_beside_their_nodes():
    found = nodes(*[hardware(cpu={"memory_corrected": count}) for count in (3, 1, 4, 1, 5, 9)], count=6)
    assert warning_lines(hardware_rows(found, environment_job())) == [
        "n1 (3), n2 (1), n3 (4), n4 (1) and 2 others: corrected memory errors, expected 0; watch whether the number grows"
    ]


def test_failures_of_a_thousand_nodes_fit_into_one_message():
    found = nodes(*[hardware(limits=ProcessLimits(1_048_576, None, 65536))] * 1000, count=1000)
    (line,) = problem_lines(hardware_rows(found, environment_job(nodes=1000)))
    assert line.startswith("n1, n2, ") and "n20 and 980 others: locked memory (ulimit -l): 65,536" in line


def test_table_shows_the_worst_first_and_names_what_is_unknown(capsys: pytest.CaptureFixture[str]):
    facts = hardware(cpu={"huge_pages": "never", "memory_uncorrected": 3}, peer_memory=False)
    print_checks(hardware_rows(nodes(facts), environment_job()))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("│ ") and " n4 " in line] == ["fail", "warn"]
    assert "unknown: n4: GPUDirect RDMA: not available: the module nvidia_peermem is not loaded" in "\n".join(lines)
    assert lines[-1].endswith(" 1 warn, 1 fail, 1 unknown")


def test_text_of_a_node_is_not_markup(capsys: pytest.CaptureFixture[str]):
    facts = hardware(kernel_log=KernelLog([KernelError("Xid", 31, "0000:3b:00", 1, "[red]MMU")]))
    print_checks(hardware_rows(nodes(facts), environment_job()))
    assert "[red]MMU" in "".join(capsys.readouterr().out.split())


def test_rows_survive_the_report(tmp_path: Path):
    from longhaul.artifacts.artifact_schemas import EnvironmentReport

    rows = hardware_rows(nodes(), environment_job())
    EnvironmentReport([], [], [], rows).write(tmp_path / "environment.json")
    assert EnvironmentReport.read(tmp_path / "environment.json").checks == rows
