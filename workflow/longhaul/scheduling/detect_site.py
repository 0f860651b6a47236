"""Verb `longhaul site detect`: writes a first site file from Slurm's partitions, node shapes, accounts and interfaces.

With a probe, short jobs also read what Slurm does not know: the GPUs' memory, their driver, the networks of compute nodes.
"""

from __future__ import annotations

import getpass
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import psutil
import yaml

from longhaul.config.gpu_datasheets import peak_tflops
from longhaul.config.partition_config import JobPlace
from longhaul.config.site_config import Site
from longhaul.errors import UserError
from longhaul.scheduling import slurm_client
from longhaul.scheduling.compare_nodes import probe_requests
from longhaul.scheduling.probe_nodes import FoundNode, ProbeAnswer, probe_nodes

_LONGEST_MINUTES = 7 * 24 * 60  # written for a partition without a limit
_DEBUG_MINUTES = 120  # a GPU partition with a shorter limit is taken for tests
_FAST_INTERFACES = re.compile(r"(ib|hsn)\d+$")


@dataclass(frozen=True)
class FoundPartition:
    """One partition as Slurm shows it.

    cpus, memory_mb: of its smallest node
    threads_per_core: of its first node
    gpus:            of the node with the most
    is_mixed:        only some of its nodes have GPUs
    """

    name: str
    is_default: bool
    max_minutes: int | None
    max_nodes: int
    nodes: int
    cpus: int
    threads_per_core: int
    memory_mb: int
    gpus: int
    gpu_type: str | None
    is_mixed: bool
    features: tuple[str, ...]
    accounts: frozenset[str] | None
    qos: frozenset[str] | None
    is_exclusive: bool
    shares_cores: bool


@dataclass(frozen=True)
class FoundCluster:
    """What a site file is written from.

    settings:     slurmctld's configuration, as `scontrol show config` prints it
    associations: the user's accounts with their QOS
    interfaces:   fast network interfaces of this machine
    probes:       what probe jobs found, by the first kind of job of their partition
    """

    partitions: Sequence[FoundPartition]
    settings: Mapping[str, str] = field(default_factory=dict)
    associations: Sequence[tuple[str, set[str]]] = ()
    interfaces: Sequence[str] = ()
    probes: Mapping[str, ProbeAnswer] = field(default_factory=dict)

    @property
    def forbids_requeue(self) -> bool:
        return self.settings.get("JobRequeue") == "0"

    @property
    def ignores_memory(self) -> bool:
        """Return whether memory is no resource of this cluster, so that jobs need not ask for it."""
        selection = self.settings.get("SelectTypeParameters", "")
        return bool(selection) and "MEMORY" not in selection.upper()

    def node(self, place: str) -> FoundNode | None:
        """Return what the probe job of a partition found; None without a probe."""
        return self.probes[place].node if place in self.probes else None


def detect_site(name: str, probe_minutes: float | None = None) -> str:
    """Return the text of a site file for this cluster, with a comment for what is not known.

    probe_minutes: how long to wait for one-minute probe jobs; None submits none

    Raises:
        UserError: Slurm does not answer, or shows no partition that is up.
    """
    try:
        partitions = found_partitions(slurm_client.show_all("partition"), slurm_client.show_all("node"))
    except slurm_client.SlurmCommandError as error:
        raise UserError(f"Slurm does not answer: {error}", "call this on a login node, and try again") from None
    associations = slurm_client.associations(getpass.getuser())
    interfaces = fast_interfaces(psutil.net_if_addrs())
    cluster = FoundCluster(partitions, slurm_client.settings(), associations, interfaces)
    if probe_minutes is not None:
        site = Site.model_validate_json(json.dumps(yaml.safe_load(site_text(name, cluster))))
        cluster = replace(cluster, probes=probe_nodes(probe_requests(site, minutes=1), probe_minutes))
    return site_text(name, cluster)


def found_partitions(partitions: Iterable[dict[str, str]], nodes: Sequence[dict[str, str]]) -> list[FoundPartition]:
    """Return the partitions that are up and have nodes, from the fields that `scontrol show` prints."""
    found = []
    for fields in partitions:
        own = [node for node in nodes if fields["PartitionName"] in node.get("Partitions", "").split(",")]
        if fields.get("State") == "UP" and own:
            found.append(_partition(fields, own))
    return found


def _partition(fields: dict[str, str], nodes: list[dict[str, str]]) -> FoundPartition:
    found = [_gpus(node.get("Gres", "")) for node in nodes]
    gpus, gpu_type = max(found, key=lambda one: one[0])
    limit = fields.get("MaxNodes", "")
    return FoundPartition(
        name=fields["PartitionName"],
        is_default=fields.get("Default") == "YES",
        max_minutes=_minutes(fields.get("MaxTime", "")),
        max_nodes=min(len(nodes), int(limit)) if limit.isdigit() else len(nodes),
        nodes=len(nodes),
        cpus=min(int(node["CPUTot"]) for node in nodes),
        threads_per_core=int(nodes[0].get("ThreadsPerCore", "1")),
        memory_mb=min(int(node["RealMemory"]) for node in nodes),
        gpus=gpus,
        gpu_type=gpu_type,
        is_mixed=gpus > 0 and min(count for count, _ in found) == 0,
        features=tuple(sorted({f for node in nodes for f in _names(node.get("AvailableFeatures", "")) or ()})),
        accounts=_names(fields.get("AllowAccounts", "")),
        qos=_names(fields.get("AllowQos", "")),
        is_exclusive=fields.get("OverSubscribe", "").startswith("EXCLUSIVE"),
        shares_cores=fields.get("OverSubscribe", "").startswith(("YES", "FORCE")),
    )


def _gpus(gres: str) -> tuple[int, str | None]:
    """Return number and type of the GPUs in a node's Gres: gpu:a100:4(S:0-1) -> 4, a100."""
    found = [re.match(r"gpu(?::([A-Za-z][\w.-]*))?:(\d+)", part) for part in re.sub(r"\([^)]*\)", "", gres).split(",")]
    counts = [(int(match[2]), match[1]) for match in found if match]
    return (sum(count for count, _ in counts), counts[0][1]) if counts else (0, None)


def _minutes(text: str) -> int | None:
    """Return the minutes of days-hours:minutes:seconds; None without a limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):\d+", text)
    if match is None:
        return None
    days, hours, minutes = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes


def _names(text: str) -> frozenset[str] | None:
    """Return the names in a comma-separated list; None for ALL, or without a list."""
    return None if text in ("", "ALL", "(null)") else frozenset(text.split(","))


def fast_interfaces(names: Iterable[str]) -> list[str]:
    """Return the InfiniBand and Slingshot interfaces of this machine; compute nodes usually have the same names."""
    return sorted(name for name in names if _FAST_INTERFACES.match(name))


def places(partitions: Sequence[FoundPartition]) -> dict[JobPlace, FoundPartition]:
    """Return the partition for each kind of job.

    gpu:   the one with the most GPUs, not for tests, and not mixed if possible; without GPUs the default one
    debug: a short GPU partition
    cpu:   without GPUs, one whose jobs do not share cores if possible, with the most nodes
    login: the one without GPUs whose jobs run longest

    Raises:
        UserError: there is no partition.
    """
    if not partitions:
        raise UserError("Slurm shows no partition that is up and has nodes", "ask your centre, or try again later")
    with_gpus = [partition for partition in partitions if partition.gpus]
    short = [p for p in with_gpus if p.max_minutes and p.max_minutes <= _DEBUG_MINUTES]
    for_training = [p for p in with_gpus if p not in short] or short
    if not for_training:
        return {"gpu": max(partitions, key=lambda p: (p.is_default, p.nodes))}
    gpu = max(for_training, key=lambda p: (not p.is_mixed, p.gpus * p.nodes, p.is_default))
    chosen: dict[JobPlace, FoundPartition] = {"gpu": gpu}
    if debug := [p for p in short if p is not gpu]:
        chosen["debug"] = max(debug, key=lambda p: p.nodes)
    if cores := [p for p in partitions if not p.gpus]:
        chosen["cpu"] = max(cores, key=lambda p: (not p.shares_cores, p.nodes, _longest(p)))
        chosen["login"] = max(cores, key=lambda p: (_longest(p), p is chosen["cpu"]))
    return chosen


def _longest(partition: FoundPartition) -> int:
    return partition.max_minutes or _LONGEST_MINUTES


def site_text(name: str, cluster: FoundCluster) -> str:
    """Return the site file."""
    chosen = places(cluster.partitions)
    lines = [
        "# Written by `longhaul site detect`. Check each line that ends in a comment against your centre's guide.",
        f"name: {name}",
        "scheduler: slurm",
        "partitions:",
    ]
    for partition in dict.fromkeys(chosen.values()):
        jobs = [place for place, found in chosen.items() if found is partition]
        lines += _partition_lines(jobs, partition, cluster)
    others = [p.name for p in cluster.partitions if p not in chosen.values()]
    lines += [f"# Not used: {', '.join(others)}"] if others else []
    lines += ["requeue: false  # JobRequeue is 0"] if cluster.forbids_requeue else []
    node = cluster.node("gpu")
    lines += _network_lines(node, fast_interfaces(node.interfaces) if node else cluster.interfaces)
    lines += ["software: {kind: current}  # or venv, conda, container, srun, modules"]
    return "\n".join([*lines, _accelerator_line(chosen["gpu"], node)]) + "\n"


def _accelerator_line(partition: FoundPartition, node: FoundNode | None) -> str:
    if not partition.gpus:
        return "accelerator: cpu"
    if node and node.toolkit:
        newest = "the newest CUDA of the driver" if node.toolkit == "cuda" else "the ROCm of the node"
        if node.version:
            return f'accelerator: {{{node.toolkit}: "{node.version}"}}  # {newest}; write the version of your torch'
    amd = (partition.gpu_type or "").lower().startswith(("mi", "amd"))
    build = '{rocm: "6.4"}' if amd or (node and node.toolkit == "rocm") else '{cuda: "13.0"}'
    return f"accelerator: {build}  # not known to Slurm: the version of your torch"


def _partition_lines(jobs: Sequence[str], partition: FoundPartition, cluster: FoundCluster) -> Iterator[str]:
    yield f"  - jobs: [{', '.join(jobs)}]"
    yield f"    name: {json.dumps(partition.name)}"
    usable = [
        (account, qos)
        for account, qos in cluster.associations
        if partition.accounts is None or account in partition.accounts
    ]
    if usable:
        account, own_qos = usable[0]
        others = f"  # or {', '.join(other for other, _ in usable[1:])}" if len(usable) > 1 else ""
        yield f"    account: {json.dumps(account)}{others}"
        if qos := sorted(own_qos & partition.qos) if partition.qos else []:
            yield f"    qos: {json.dumps(qos[0])}" + (f"  # or {', '.join(qos[1:])}" if qos[1:] else "")
    elif partition.accounts:
        yield f"    # account: the partition accepts {', '.join(sorted(partition.accounts))}"
    if partition.features:
        yield f"    # constraint: nodes have the features {', '.join(partition.features)}"
    limit = "" if partition.max_minutes else "  # the partition has no limit"
    yield f"    max_minutes: {partition.max_minutes or _LONGEST_MINUTES}{limit}"
    yield f"    max_nodes: {partition.max_nodes}"
    if partition.is_exclusive:
        yield "    exclusive: true"
    gpus, comment = _gpu_keys(partition, cluster.node(jobs[0]))
    yield f"    node: {{cpus: {partition.cpus}, memory_mb: {partition.memory_mb}{gpus}}}{comment}"
    if jobs[0] in cluster.probes and (problem := cluster.probes[jobs[0]].problem):
        yield f"    # the probe found nothing: {problem}"
    if partition.threads_per_core > 1:
        threads = partition.threads_per_core
        yield f"    # threads_per_core: cpus counts {threads} hardware threads of each core; 1 uses one of them"
    if partition.gpu_type:
        yield f"    gpu_type: {json.dumps(partition.gpu_type)}"
    if cluster.ignores_memory:
        yield "    memory: omit  # Slurm does not count memory here"


def _gpu_keys(partition: FoundPartition, node: FoundNode | None) -> tuple[str, str]:
    """Return the keys of `node` about GPUs, and a comment."""
    if not partition.gpus:
        return "", ""
    keys = f", gpus: {partition.gpus}"
    if node is None or not node.gpu_names:
        return keys, "  # gpu_memory_gib, gpu_peak_tflops: not known to Slurm"
    keys += f", gpu_memory_gib: {node.gpu_memory_gib:g}"
    rate = peak_tflops(node.gpu_names[0])
    return keys + (f", gpu_peak_tflops: {rate:g}" if rate else ""), f"  # {', '.join(dict.fromkeys(node.gpu_names))}"


def _network_lines(node: FoundNode | None, interfaces: Sequence[str]) -> list[str]:
    where = "on a GPU node" if node else "on this machine"
    if not interfaces:
        return [f"interconnect: {{kind: ethernet}}  # no ib or hsn interface {where}; set socket_interface"]
    infiniband = [name for name in interfaces if name.startswith("ib")]
    kind, name = ("infiniband", infiniband[0]) if infiniband else ("ethernet", ",".join(interfaces))
    return [f"interconnect: {{kind: {kind}, socket_interface: {json.dumps(name)}}}  # as {where}"]
