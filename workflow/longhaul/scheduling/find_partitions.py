"""Reads partitions, nodes and gres names (gpu:a100:4) from `scontrol show`, and chooses a partition for each kind of job."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from longhaul.config.partition_config import JobPlace
from longhaul.errors import UserError
from longhaul.scheduling.probe_nodes import FoundNode, ProbeAnswer
from longhaul.scheduling.slurm_client import Association

_DEBUG_MINUTES = 120  # a partition with this limit or a shorter one counts as one for tests
BY_PARTITION, BY_QOS = "preempt/partition_prio", "preempt/qos"
"""Values of PreemptType."""
_MODES = {"REQUEUE", "CANCEL", "SUSPEND"}


@dataclass(frozen=True)
class FoundPartition:
    """One partition as Slurm shows it. Of nodes with different GPUs, those with the most GPUs together count.

    cpus, memory_mb: what a job gets of the smallest node, without the cores and the memory that Slurm keeps for the system
    threads_per_core: of the first node
    gpus:            of one node
    is_mixed:        only some nodes have GPUs
    groups, accounts, qos: who may use it; None: all
    preempted_by:    partitions whose jobs end, requeue or suspend its jobs
    preempt_mode:    how: REQUEUE, CANCEL or GANG,SUSPEND
    other_gpus:      GPUs of the same nodes or of others that do not count, such as 4 x v100
    min_nodes:       jobs on fewer nodes do not start
    limits_time, limits_nodes: what sets max_minutes or max_nodes, such as "QOS long", if not the partition itself
    """

    name: str
    is_default: bool
    max_minutes: int | None
    min_nodes: int
    max_nodes: int
    nodes: int
    cpus: int
    threads_per_core: int
    memory_mb: int
    gpus: int
    gpu_type: str | None
    is_mixed: bool
    preempted_by: tuple[str, ...]
    preempt_mode: str
    other_gpus: tuple[str, ...]
    features: tuple[str, ...]
    groups: frozenset[str] | None
    accounts: frozenset[str] | None
    denied_accounts: frozenset[str]
    qos: frozenset[str] | None
    denied_qos: frozenset[str]
    is_exclusive: bool
    shares_cores: bool
    limits_time: str = ""
    limits_nodes: str = ""

    @property
    def is_for_tests(self) -> bool:
        """Return whether the time limit is that of tests. A limit of the user's QOS or account says nothing about it."""
        return bool(self.max_minutes) and self.longest_minutes <= _DEBUG_MINUTES and not self.limits_time

    @property
    def takes_one_node(self) -> bool:
        return self.min_nodes == 1

    @property
    def is_preemptible(self) -> bool:
        return bool(self.preempted_by)

    @property
    def has_slices(self) -> bool:
        """Return whether the GPUs are MIG slices, not whole GPUs."""
        return _is_slice(self.gpu_type)

    @property
    def longest_minutes(self) -> int:
        """Return the time limit to write: that of the partition, or a week where it has none."""
        return self.max_minutes or 7 * 24 * 60

    def accepts(self, association: Association) -> bool:
        """Return whether the partition lets jobs of this account run, with one of its QOS."""
        accounts = {association.account, *association.parents}
        is_allowed = self.accounts is None or bool(accounts & self.accounts)
        is_for_it = association.partition in ("", self.name)
        needs_qos = self.qos is not None or bool(association.qos)
        has_qos = bool(self.allowed_qos(association)) or not needs_qos
        return is_allowed and is_for_it and has_qos and not accounts & self.denied_accounts

    def allowed_qos(self, association: Association) -> frozenset[str]:
        """Return the QOS of an account that jobs here may have."""
        return (association.qos if self.qos is None else association.qos & self.qos) - self.denied_qos


@dataclass(frozen=True)
class FoundCluster:
    """Facts about a cluster from which a site file is written.

    settings:     slurmctld's configuration, as `scontrol show config` prints it
    associations: the user's accounts with their QOS, on this cluster
    groups:       the user's groups
    qos:          the fields of each QOS, as sacctmgr shows them
    interfaces:   fast network interfaces of this machine
    not_up:       partitions that start no jobs now, such as "boost (DRAIN)"
    probes:       what probe jobs found, by the first kind of job of their partition
    """

    partitions: Sequence[FoundPartition]
    settings: Mapping[str, str] = field(default_factory=dict)
    associations: Sequence[Association] = ()
    groups: Set[str] = frozenset()
    qos: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    interfaces: Sequence[str] = ()
    not_up: Sequence[str] = ()
    probes: Mapping[str, ProbeAnswer] = field(default_factory=dict)

    @property
    def accepting(self) -> list[FoundPartition]:
        """Return the partitions for the user's groups that accept one of the user's accounts.

        Where none does, or no account is known, these are all for the user's groups.
        """
        permitted = [p for p in self.partitions if p.groups is None or p.groups & self.groups]
        return [p for p in permitted if any(map(p.accepts, self.associations))] or permitted

    @property
    def forbids_requeue(self) -> bool:
        return self.settings.get("JobRequeue") == "0"

    @property
    def ignores_memory(self) -> bool:
        """Return whether memory is no resource of this cluster, so that jobs need not ask for it."""
        selection = self.settings.get("SelectTypeParameters", "")
        return bool(selection) and "MEMORY" not in selection.upper()

    def preempting_qos(self, name: str) -> list[str]:
        """Return the QOS whose jobs take nodes from jobs of a QOS, in any partition."""
        if self.settings.get("PreemptType") != BY_QOS:
            return []
        return [other for other, fields in self.qos.items() if name in fields.get("Preempt", "").split(",")]

    def node(self, place: str) -> FoundNode | None:
        """Return what the probe job of a partition found; None without a probe."""
        return self.probes[place].node if place in self.probes else None


def found_partitions(
    partitions: Iterable[dict[str, str]], nodes: Sequence[dict[str, str]], settings: Mapping[str, str] | None = None
) -> list[FoundPartition]:
    """Return the partitions that are up, have nodes and are for users, from the fields that `scontrol show` prints.

    Those that the centre hides, or whose jobs all need a reservation, are left out.

    settings: slurmctld's configuration, with limits for all partitions
    """
    found, shown, settings = [], list(partitions), settings or {}
    for fields in shown:
        own = [node for node in nodes if fields["PartitionName"] in node.get("Partitions", "").split(",")]
        is_special = "YES" in map(fields.get, ("RootOnly", "ReqResv", "Hidden"))
        if fields.get("State") == "UP" and own and not is_special:
            beside = {name for node in own for name in node["Partitions"].split(",")}
            preempting = _preempting(fields, [one for one in shown if one["PartitionName"] in beside], settings)
            found.append(_partition(with_memory_limit(fields, settings), own, preempting))
    return found


def with_memory_limit(fields: dict[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """Return the fields of a partition with the cluster's limit of memory, which holds where the partition has none."""
    keys = ("MaxMemPerCPU", "MaxMemPerNode")
    has_limit = any(fields.get(key, "").isdigit() for key in keys)
    return fields if has_limit else {**fields, **{key: settings[key] for key in keys if key in settings}}


def _preempting(
    fields: dict[str, str], beside: Iterable[dict[str, str]], settings: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the partitions whose jobs take nodes from jobs of a partition; beside: the partitions on its nodes.

    PreemptMode is that of the cluster where the partition names none, and then tells nothing by itself. The tier decides, unless
    PreemptType is preempt/qos or none (https://slurm.schedmd.com/preempt.html).
    """
    if settings.get("PreemptType", BY_PARTITION) != BY_PARTITION or not _MODES & {
        *fields.get("PreemptMode", "").split(",")
    }:
        return ()
    tier = int(fields.get("PriorityTier", "1"))
    return tuple(one["PartitionName"] for one in beside if int(one.get("PriorityTier", "1")) > tier)


def _partition(fields: dict[str, str], all_nodes: list[dict[str, str]], preempting: tuple[str, ...]) -> FoundPartition:
    kinds = Counter(_gpus(node.get("Gres", "")) for node in all_nodes)
    gpus, gpu_type = max(kinds, key=lambda kind: (kind[0] > 0, not _is_slice(kind[1]), kind[0] * kinds[kind], kind[0]))
    nodes = [node for node in all_nodes if _gpus(node.get("Gres", "")) == (gpus, gpu_type)]
    types = {kind for node in all_nodes for kind in _gpu_counts(node.get("Gres", ""))}
    limit = fields.get("MaxNodes", "")
    cpus = _least((_cpus(node, fields.get("MaxCPUsPerSocket", "")) for node in nodes), fields.get("MaxCPUsPerNode", ""))
    return FoundPartition(
        name=fields["PartitionName"],
        is_default=fields.get("Default") == "YES",
        max_minutes=minutes_of(fields.get("MaxTime", "")),
        min_nodes=max(int(fields.get("MinNodes", "0")), 1),
        max_nodes=min(len(nodes), int(limit)) if limit.isdigit() else len(nodes),
        nodes=len(nodes),
        cpus=cpus,
        threads_per_core=int(nodes[0].get("ThreadsPerCore", "1")),
        memory_mb=_memory_of_job(nodes, cpus, fields),
        gpus=gpus,
        gpu_type=gpu_type,
        is_mixed=gpus > 0 and (0, None) in kinds,
        preempted_by=preempting,
        preempt_mode=fields.get("PreemptMode", ""),
        other_gpus=tuple(
            f"{count} x {kind or 'gpu'}" for count, kind in sorted(types, key=str) if (count, kind) != (gpus, gpu_type)
        ),
        features=tuple(sorted({f for node in nodes for f in _names(node.get("AvailableFeatures", "")) or ()})),
        groups=_names(fields.get("AllowGroups", "")),
        accounts=_names(fields.get("AllowAccounts", "")),
        denied_accounts=_names(fields.get("DenyAccounts", "")) or frozenset(),
        qos=_names(fields.get("AllowQos", "")),
        denied_qos=_names(fields.get("DenyQos", "")) or frozenset(),
        is_exclusive=fields.get("OverSubscribe") == "EXCLUSIVE" or fields.get("Exclusive") in ("NODE", "TOPO"),
        shares_cores=fields.get("OverSubscribe", "").startswith(("YES", "FORCE")),
    )


def _cpus(node: dict[str, str], most_per_socket: str) -> int:
    """Return the CPUs of a node that jobs get: CPUEfctv; before Slurm 22.05, without those of the cores in CoreSpecCount.

    most_per_socket: limit of the partition, or UNLIMITED
    """
    all_cores = int(node["CPUTot"]) - int(node.get("CoreSpecCount", "0")) * int(node.get("ThreadsPerCore", "1"))
    usable = int(node.get("CPUEfctv", all_cores))
    return min(usable, int(node.get("Sockets", "1")) * int(most_per_socket)) if most_per_socket.isdigit() else usable


def _memory_of_job(nodes: Sequence[dict[str, str]], cpus: int, fields: Mapping[str, str]) -> int:
    """Return the memory of a job that has all CPUs of the smallest node, in MiB.

    Nodes whose memory is not configured (RealMemory=1) count only if there are no others.
    """
    known = [memory for node in nodes if (memory := _memory_mb(node)) > 1]
    per_cpu = fields.get("MaxMemPerCPU", "")
    limits = [cpus * int(per_cpu)] if known and per_cpu.isdigit() else []
    return _least([*(known or [1]), *limits], fields.get("MaxMemPerNode", ""))


def _memory_mb(node: dict[str, str]) -> int:
    return int(node["RealMemory"]) - int(node.get("MemSpecLimit", "0"))


def _least(values: Iterable[int], limit: str) -> int:
    """Return the smallest value, at most a limit of the partition; UNLIMITED is none."""
    return min([*values, *([int(limit)] if limit.isdigit() else [])])


def _gpus(gres: str) -> tuple[int, str | None]:
    """Return number and type of the GPUs in a node's Gres: gpu:a100:4(S:0-1) -> 4, a100.

    Of several types, the one with the most GPUs counts, and MIG slices only without whole GPUs.
    """
    return max(_gpu_counts(gres), key=lambda kind: (not _is_slice(kind[1]), kind[0]), default=(0, None))


def _gpu_counts(gres: str) -> list[tuple[int, str | None]]:
    """Return number and type of each type of GPU in a node's Gres. One type may stand there twice, with other cores."""
    counts: Counter[str | None] = Counter()
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        if match := re.fullmatch(r"gpu(?::([\w.+-]+))?:(\d+)", part):
            counts[match[1]] += int(match[2])
    return [(count, kind) for kind, count in counts.items() if count]


def _is_slice(gpu_type: str | None) -> bool:
    """Return whether a type of GPU is a slice of one (MIG), such as a100_1g.5gb or nvidia_a100_1g.10gb+me."""
    return bool(re.search(r"\dg\.\d+gb", gpu_type or ""))


def minutes_of(text: str) -> int | None:
    """Return the minutes of Slurm's days-hours:minutes:seconds; None without a limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):\d+", text)
    if match is None:
        return None
    days, hours, minutes = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes


def _names(text: str) -> frozenset[str] | None:
    """Return the names in a comma-separated list; None for ALL, or without a list."""
    return None if text in ("", "ALL", "(null)") else frozenset(text.split(","))


def places(partitions: Sequence[FoundPartition]) -> dict[JobPlace, FoundPartition]:
    """Return the partition for each kind of job.

    gpu:   the best one for training that is not for tests; without GPUs the default one
    debug: a short GPU partition
    cpu:   without GPUs, the best one for jobs of one node
    login: the one without GPUs whose jobs run longest, not preemptible if possible
    cpu and login: only partitions that take jobs of one node

    Raises:
        UserError: there is no partition.
    """
    if not partitions:
        raise UserError(
            "Slurm shows no partition that is up, has nodes and is for your groups",
            "ask your centre, or try again later",
        )
    with_gpus = [partition for partition in partitions if partition.gpus]
    short = [p for p in with_gpus if p.is_for_tests]
    for_training = [p for p in with_gpus if p not in short] or short
    if not for_training:
        return {"gpu": max(partitions, key=lambda p: (p.takes_one_node, not p.is_preemptible, p.is_default, p.nodes))}
    gpu = max(for_training, key=_rank_for_training)
    chosen: dict[JobPlace, FoundPartition] = {"gpu": gpu}
    if debug := [p for p in short if p is not gpu]:
        chosen["debug"] = max(debug, key=lambda p: (p.takes_one_node, not p.is_preemptible, p.nodes))
    if cores := [p for p in partitions if not p.gpus and p.takes_one_node]:
        chosen["cpu"] = max(cores, key=_rank_for_cpu_jobs)
        chosen["login"] = max(cores, key=lambda p: (not p.is_preemptible, p.longest_minutes, p is chosen["cpu"]))
    return chosen


def _rank_for_training(partition: FoundPartition) -> tuple[bool, bool, bool, bool, int, bool]:
    """Return a larger value for a partition with whole GPUs, on all nodes, for jobs of any size, that is not preemptible, with
    more GPUs.
    """
    is_good = not partition.has_slices, not partition.is_mixed, partition.takes_one_node, not partition.is_preemptible
    return *is_good, partition.gpus * partition.nodes, partition.is_default


def _rank_for_cpu_jobs(partition: FoundPartition) -> tuple[bool, bool, bool, int, int]:
    """Return a larger value for a partition not for tests, with cores of its own, not preemptible, with longer jobs."""
    is_good = not partition.is_for_tests, not partition.shares_cores, not partition.is_preemptible
    return *is_good, partition.longest_minutes, partition.nodes
