"""Reads the limits of time, of nodes, and of nodes times minutes of a job: those of its partition, QOS and account, from
scontrol and sacctmgr.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from longhaul.config.partition_config import Partition
from longhaul.errors import UserError
from longhaul.scheduling import slurm_client
from longhaul.scheduling.find_partitions import minutes_of, with_memory_limit

_JOB_TRES = ("MaxTRES", "MaxTRESPU", "MaxTRESPA", "GrpTRES")
# Of one job, and the budget of all jobs together, which one job alone must not exceed either.
_TRES_MINUTES = ("MaxTRESMins", "GrpTRESMins")
_QOS_FIELDS = ("Name", "MaxWall", *_JOB_TRES, *_TRES_MINUTES, "Flags", "Preempt")
_ASSOCIATION_FIELDS = ("User", "Account", "Partition", "DefaultQOS", "MaxWall", "MaxTRES", "GrpTRES", *_TRES_MINUTES)
_TRES = r"(?:^|,)((?:node|cpu|gres/gpu)(?::[\w.+-]+)?)=(\d+)(?=,|$)"
"""Trackable resources (TRES) and their limits: cpu=1280,gres/gpu:a100=64,node=16."""
Fields = Mapping[str, str]


@dataclass(frozen=True)
class SlurmLimits:
    """Limits that Slurm shows: partitions and QOS by name, and associations on this cluster: the user's and whole accounts'.

    An account's own row, without a user, has the budget that all its users share.
    """

    partitions: Mapping[str, Fields]
    qos: Mapping[str, Fields]
    associations: Sequence[Fields]


@dataclass(frozen=True)
class JobLimit:
    """A limit of one job. source: who sets it, such as "QOS long". None: there is no limit."""

    source: str
    minutes: int | None
    nodes: int | None


@dataclass(frozen=True)
class MinutesLimit:
    """A limit of a resource times the minutes of a job, such as 1,000 node minutes.

    source:   who sets it, such as "QOS long"
    resource: node, cpu or gres/gpu
    """

    source: str
    resource: str
    minutes: int


def read_limits() -> SlurmLimits | None:
    """Return what Slurm shows; None if it does not answer. Without accounting, limits of partitions alone."""
    try:
        partitions = slurm_client.show_all("partition")
    except (slurm_client.SlurmCommandError, UserError):
        return None
    settings = slurm_client.settings()
    cluster = settings.get("ClusterName", "")
    associations = [
        row
        for user in (getpass.getuser(), "")
        for row in slurm_client.accounting_rows(
            "assoc", *slurm_client.association_filter(user, cluster), fields=_ASSOCIATION_FIELDS
        )
    ]
    return SlurmLimits(
        {fields["PartitionName"]: with_memory_limit(fields, settings) for fields in partitions},
        {fields["Name"]: fields for fields in slurm_client.accounting_rows("qos", fields=_QOS_FIELDS)},
        associations,
    )


def limits_of(partition: Partition, shown: SlurmLimits) -> list[JobLimit]:
    """Return the limits of a job in a partition of the site file.

    QOS and account: of each limit, the first one in Slurm's order counts, also if a later one is smaller
    (https://slurm.schedmd.com/resource_limits.html). No job exceeds those of its partition, unless a flag of its QOS says so.
    """
    own = _own_partitions(partition, shown)
    qos = _qos(partition, own, _associations(partition, shown), shown)
    return [
        *_partition_limits(partition, own, {flag for one in qos for flag in one["Flags"].split(",")}),
        *_first_limits(_sources(partition, shown), partition),
    ]


def minutes_limits_of(partition: Partition, shown: SlurmLimits) -> list[MinutesLimit]:
    """Return the limits of resources times minutes of a job in a partition of the site file, the first one in Slurm's order."""
    found: dict[tuple[str, str], MinutesLimit] = {}
    for source, fields in _sources(partition, shown):
        for key in _TRES_MINUTES:
            for resource, number in re.findall(_TRES, fields.get(key, "")):
                limit = MinutesLimit(source, resource.partition(":")[0], int(number))
                found.setdefault((key, resource), limit)
    return list(found.values())


def _own_partitions(partition: Partition, shown: SlurmLimits) -> list[Fields]:
    return [shown.partitions[name] for name in names_of(partition) if name in shown.partitions]


def _sources(partition: Partition, shown: SlurmLimits) -> list[tuple[str, Fields]]:
    """Return who sets limits of a job beside its partitions, and the fields, in Slurm's order."""
    associations = _associations(partition, shown)
    qos = _qos(partition, _own_partitions(partition, shown), associations, shown)
    accounts = [one for one in shown.associations if one["Account"] == partition.account and not one["User"]]
    return [
        *((f"QOS {one['Name']}", one) for one in qos),
        *((f"account {one['Account']}", one) for one in (*associations, *accounts)),
    ]


def _partition_limits(partition: Partition, own: Sequence[Fields], qos_flags: Set[str]) -> Iterator[JobLimit]:
    """Yield the limit of Slurm's partitions. A job may start in any of several. Two flags of a QOS replace their limits."""
    if own:
        minutes = _largest(minutes_of(one.get("MaxTime", "")) for one in own)
        nodes = _largest(_partition_nodes(one) for one in own)
        yield JobLimit(
            f"partition {partition.name}",
            None if "PartitionTimeLimit" in qos_flags else minutes,
            None if "PartitionMaxNodes" in qos_flags else nodes,
        )


def _first_limits(sources: Sequence[tuple[str, Fields]], partition: Partition) -> Iterator[JobLimit]:
    """Yield the limits of QOS and account that count; sources: where the fields are from, in Slurm's order."""
    seen: set[str] = set()
    for source, fields in sources:
        nodes = node_limits(fields, partition.node.cpus, partition.node.gpus)
        minutes = minutes_of(fields["MaxWall"])
        new = [count for limit, count in nodes.items() if limit not in seen]
        yield JobLimit(source, None if "MaxWall" in seen else minutes, min(new, default=None))
        seen |= {*nodes, *(["MaxWall"] if minutes is not None else [])}


def names_of(partition: Partition) -> list[str]:
    """Return the names of Slurm's partitions that a partition of the site file stands for."""
    return [name for name in (partition.name or "").split(",") if name]


def _associations(partition: Partition, shown: SlurmLimits) -> list[Fields]:
    """Return the association of a job; one for its partition alone replaces that for all partitions."""
    found = [one for one in shown.associations if one["Account"] == partition.account and one["User"]]
    of_partition = [one for one in found if partition.name and one["Partition"] == partition.name]
    return (of_partition or [one for one in found if not one["Partition"]])[:1]


def _qos(
    partition: Partition, own: Sequence[Fields], associations: Sequence[Fields], shown: SlurmLimits
) -> list[Fields]:
    """Return the QOS of the partitions and that of the job, in Slurm's order. The account has one where none is named."""
    named = [partition.qos] if partition.qos else [one["DefaultQOS"] for one in associations]
    of_job = [shown.qos[name] for name in named if name in shown.qos]
    of_partition = [shown.qos[name] for one in own if (name := one.get("QoS", "")) in shown.qos]
    goes_first = any("OverPartQOS" in one["Flags"].split(",") for one in of_job)
    ordered = [*of_job, *of_partition] if goes_first else [*of_partition, *of_job]
    return list({one["Name"]: one for one in ordered}.values())


def _partition_nodes(fields: Fields) -> int | None:
    counts = [int(fields[key]) for key in ("MaxNodes", "TotalNodes") if fields.get(key, "").isdigit()]
    return min(counts, default=None)


def node_limits(fields: Fields, cpus: int, gpus: int) -> dict[str, int]:
    """Return how many nodes with these CPUs and GPUs each limit of trackable resources allows.

    Of a limit below a whole node, a job gets a part of one.
    """
    per_node = {"node": 1, "cpu": cpus, "gres/gpu": gpus}
    counts: dict[str, int] = {}
    for key in _JOB_TRES:
        for name, number in re.findall(_TRES, fields.get(key, "")):
            if of_node := per_node[name.partition(":")[0]]:
                counts[f"{key} {name}"] = max(min(int(number), 1), int(number) // of_node)
    return counts


def fewest_nodes(partition: Partition, shown: SlurmLimits) -> int:
    """Return the smallest number of nodes with which a job starts in a partition of the site file: in any of Slurm's."""
    own = _own_partitions(partition, shown)
    qos = _qos(partition, own, _associations(partition, shown), shown)
    if any("PartitionMinNodes" in one["Flags"].split(",") for one in qos):
        return 1
    return max(min((int(one.get("MinNodes", "0")) for one in own), default=1), 1)


def most_memory(partition: Partition, shown: SlurmLimits) -> int | None:
    """Return the most memory per node in MiB with which a job starts in any of the partitions; None without a limit."""
    limits = [one.get("MaxMemPerNode", "") for one in _own_partitions(partition, shown)]
    return _largest(int(limit) if limit.isdigit() else None for limit in limits) if limits else None


def state(partition: Partition, shown: SlurmLimits) -> str:
    """Return UP if one of the partitions starts jobs or is not shown, else the state of the first one."""
    states = [one.get("State", "UP") for one in _own_partitions(partition, shown)]
    return "UP" if "UP" in states or not states else states[0]


def _largest(values: Iterable[int | None]) -> int | None:
    """Return the largest value; None, which is no limit, if any is None."""
    found = list(values)
    return None if None in found else max(value for value in found if value is not None)


def smallest(limits: Iterable[tuple[int | None, str]]) -> tuple[int, str] | None:
    """Return the smallest of some values with their sources; None where no value is a limit."""
    return min(((value, source) for value, source in limits if value is not None), default=None)
