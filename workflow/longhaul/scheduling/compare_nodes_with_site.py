"""Compares what probe jobs found on the nodes with the site file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longhaul.config.partition_config import JobPlace, Partition
from longhaul.config.site_config import Site
from longhaul.errors import printable
from longhaul.planning.slurm_request import SlurmRequest, gpu_request
from longhaul.scheduling.probe_nodes import FoundNode, ProbeAnswer

_PROBE_MINUTES = 2
_PROBED: tuple[JobPlace, ...] = ("gpu", "debug", "cpu", "login")
_MEMORY_TOLERANCE = 1.03  # a card of "80 GB" has 79.6 GiB


@dataclass(frozen=True)
class Comparison:
    """One line of the table. problem: empty where the node has what the site file says."""

    place: str
    subject: str
    site_file: str
    found: str
    problem: str = ""


def probe_requests(site: Site, minutes: int = _PROBE_MINUTES) -> dict[str, SlurmRequest]:
    """Return the request of one probe job per partition, by the first kind of job that the partition serves.

    It is a whole node as the site file describes it.
    """
    requests: dict[str, SlurmRequest] = {}
    for partition in site.partitions:
        first: JobPlace | None = next((kind for kind in _PROBED if kind in partition.jobs), None)
        if first:
            requests[first] = _probe_request(site, first, minutes)
    return requests


def _probe_request(site: Site, kind: JobPlace, minutes: int) -> SlurmRequest:
    node = site.partition_for(kind).node
    return gpu_request(site, place=kind, nodes=1, tasks=1, gpus=node.gpus or node.cpus, minutes=minutes)


def compare_nodes(site: Site, answers: Mapping[str, ProbeAnswer]) -> list[Comparison]:
    """Return one line for each fact of each partition that was probed."""
    lines: list[Comparison] = []
    for place, answer in answers.items():
        if answer.node is None:
            lines.append(Comparison(place, "probe job", "-", answer.problem, answer.remedy))
        else:
            partition = next(partition for partition in site.partitions if place in partition.jobs)
            lines += [replace(line, place=place) for line in _compare(site, partition, answer.node)]
    return lines


def _compare(site: Site, partition: Partition, node: FoundNode) -> Iterator[Comparison]:
    shape = partition.node
    yield _at_least("cpus", shape.cpus, node.cpus, "node.cpus")
    yield _at_least("memory, MiB", shape.memory_mb, node.memory_mib, "node.memory_mb")
    if shape.gpus or node.gpu_names:
        yield _gpus(shape.gpus, node)
    if shape.gpus and node.gpu_memory_gib:
        yield _gpu_memory(shape.gpu_memory_gib, node.gpu_memory_gib)
    if shape.gpus and node.gpu_names:
        yield _toolkit(site, node)
    if partition.jobs != ("login",):  # the controller is one process
        yield from _networks(site, partition, node)


def _networks(site: Site, partition: Partition, node: FoundNode) -> Iterator[Comparison]:
    if site.interconnect.socket_interface:
        yield _interfaces(site.interconnect.socket_interface, node)
    if site.interconnect.kind in ("infiniband", "roce") and partition.max_nodes > 1:
        yield _ports(site.interconnect.kind, node)


def _at_least(subject: str, written: int, found: int, key: str) -> Comparison:
    problem = "" if found >= written else f"set {key} to at most {found}"
    return Comparison("", subject, str(written), str(found), problem)


def _gpus(written: int, node: FoundNode) -> Comparison:
    found = len(node.gpu_names)
    names = ", ".join(dict.fromkeys(node.gpu_names)) or "none of nvidia-smi, amd-smi and rocm-smi shows a GPU"
    # A node may have GPUs that the job did not ask for.
    problem = _wrong_number_of_gpus(found) if written and found != written else ""
    return Comparison("", "GPUs", str(written), f"{found} ({names})", problem)


def _wrong_number_of_gpus(found: int) -> str:
    if found:
        return f"set node.gpus to {found}, or correct gpu_request and gpu_type"
    return (
        "correct gpu_request and gpu_type; if these nodes have no GPUs, remove node.gpus, and set accelerator to cpu where no "
        "partition has GPUs"
    )


def _gpu_memory(written: float | None, found: float) -> Comparison:
    is_right = written is not None and written <= found * _MEMORY_TOLERANCE
    problem = "" if is_right else f"set node.gpu_memory_gib to {found:g}"
    return Comparison("", "memory of a GPU, GiB", "-" if written is None else f"{written:g}", f"{found:g}", problem)


def _toolkit(site: Site, node: FoundNode) -> Comparison:
    written = site.accelerator
    found = f"{node.toolkit} {node.version or '(version not known)'}" if node.toolkit else "no driver"
    wanted = "cuda" if written.cuda else "rocm"
    problem = (
        "" if node.toolkit == wanted else f"the build {written.build} does not fit these GPUs; correct accelerator"
    )
    if not problem and written.cuda and node.version and _major(node.version) < _major(written.cuda):
        # Builds of one major version of CUDA run with every driver of that version.
        problem = f"the driver supports CUDA {node.version}; use such a build of torch, and correct accelerator"
    return Comparison("", "driver", written.build, found, problem)


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _interfaces(written: str, node: FoundNode) -> Comparison:
    # NCCL and gloo take each word as the beginning of a name.
    missing = [word for word in written.split(",") if not any(name.startswith(word) for name in node.interfaces)]
    found = ", ".join(name for name in node.interfaces if name != "lo")
    problem = f"there is no {', '.join(missing)}; correct interconnect.socket_interface" if missing else ""
    return Comparison("", "network interfaces", written, found, problem)


def _ports(kind: str, node: FoundNode) -> Comparison:
    layer = {"infiniband": "InfiniBand", "roce": "Ethernet"}[kind]
    found = ", ".join(f"{node.rdma_ports.count(name)} x {name}" for name in dict.fromkeys(node.rdma_ports)) or "none"
    problem = "" if layer in node.rdma_ports else "correct interconnect.kind"
    return Comparison("", "active RDMA ports", kind, found, problem)


def print_comparisons(title: str, lines: Sequence[Comparison], written: str = "site file") -> None:
    """Print a table of the comparisons, and a remedy for each difference. written: what the first values are"""
    table = Table(title=title, title_justify="left")
    for column in ("jobs", "", written, "found", "fits"):
        table.add_column(column, overflow="fold")
    for line in lines:
        cells = (line.place, line.subject, line.site_file, line.found, "NO" if line.problem else "yes")
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console = Console(width=120)
    console.print(table)
    for line in lines:
        if line.problem:
            console.print(f"{line.place}, {line.subject}: {printable(line.problem)}", markup=False)
