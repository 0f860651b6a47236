"""Reads the limits of time and nodes of a job: those of its partition, its QOS and its account, from scontrol and sacctmgr."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from longhaul.config.partition_config import Partition
from longhaul.errors import UserError
from longhaul.scheduling import slurm_client
from longhaul.scheduling.find_partitions import minutes_of

_JOB_TRES = ("MaxTRES", "MaxTRESPU", "MaxTRESPA", "GrpTRES")
_QOS_FIELDS = ("Name", "MaxWall", *_JOB_TRES, "Flags")
_ASSOCIATION_FIELDS = ("Account", "Partition", "DefaultQOS", "MaxWall", "MaxTRES", "GrpTRES")
Fields = Mapping[str, str]


@dataclass(frozen=True)
class SlurmLimits:
    """Limits that Slurm shows: partitions and QOS by name, and the user's associations on this cluster."""

    partitions: Mapping[str, Fields]
    qos: Mapping[str, Fields]
    associations: Sequence[Fields]


@dataclass(frozen=True)
class JobLimit:
    """A limit of one job. source: who sets it, such as "QOS long". None: there is no limit."""

    source: str
    minutes: int | None
    nodes: int | None


def read_limits() -> SlurmLimits | None:
    """Return what Slurm shows; None if it does not answer. Without accounting, limits of partitions alone."""
    try:
        partitions = slurm_client.show_all("partition")
    except (slurm_client.SlurmCommandError, UserError):
        return None
    cluster = slurm_client.settings().get("ClusterName", "")
    conditions = slurm_client.association_filter(getpass.getuser(), cluster)
    return SlurmLimits(
        {fields["PartitionName"]: fields for fields in partitions},
        {fields["Name"]: fields for fields in slurm_client.accounting_rows("qos", fields=_QOS_FIELDS)},
        slurm_client.accounting_rows("assoc", *conditions, fields=_ASSOCIATION_FIELDS),
    )


def limits_of(partition: Partition, shown: SlurmLimits) -> list[JobLimit]:
    """Return all limits of a job in a partition of the site file."""
    own = [shown.partitions[name] for name in names_of(partition) if name in shown.partitions]
    associations = [one for one in shown.associations if _is_for(one, partition)]
    qos = _qos(partition, own, associations, shown)
    flags = {flag for one in qos for flag in one["Flags"].split(",")}
    limits = []
    if own:
        # A job may start in any of several partitions. Two flags of a QOS replace the limits of its partition.
        minutes = None if "PartitionTimeLimit" in flags else _largest(minutes_of(one.get("MaxTime", "")) for one in own)
        nodes = None if "PartitionMaxNodes" in flags else _largest(_partition_nodes(one) for one in own)
        limits.append(JobLimit(f"partition {partition.name}", minutes, nodes))
    accounting = [*((f"QOS {one['Name']}", one) for one in qos)]
    accounting += [(f"account {one['Account']}", one) for one in associations]
    return [
        *limits,
        *(JobLimit(source, minutes_of(one["MaxWall"]), _nodes(one, partition)) for source, one in accounting),
    ]


def names_of(partition: Partition) -> list[str]:
    """Return the names of Slurm's partitions that a partition of the site file stands for."""
    return [name for name in (partition.name or "").split(",") if name]


def _is_for(association: Fields, partition: Partition) -> bool:
    return association["Account"] == partition.account and association["Partition"] in ("", partition.name)


def _qos(
    partition: Partition, own: Sequence[Fields], associations: Sequence[Fields], shown: SlurmLimits
) -> list[Fields]:
    """Return the QOS of a job, which is the account's default one where none is named, and those of its partitions."""
    named = [partition.qos] if partition.qos else [one["DefaultQOS"] for one in associations]
    names = dict.fromkeys([*named, *(fields.get("QoS", "") for fields in own)])
    return [shown.qos[name] for name in names if name in shown.qos]


def _partition_nodes(fields: Fields) -> int | None:
    counts = [int(fields[key]) for key in ("MaxNodes", "TotalNodes") if fields.get(key, "").isdigit()]
    return min(counts, default=None)


def _nodes(fields: Fields, partition: Partition) -> int | None:
    """Return how many nodes the limits of trackable resources (TRES) allow: cpu=1280,gres/gpu=64,node=16.

    Of a limit below a whole node, a job gets a part of one.
    """
    per_node = {"node": 1, "cpu": partition.node.cpus, "gres/gpu": partition.node.gpus}
    counts = []
    for key in _JOB_TRES:
        for name, number in re.findall(r"(?:^|,)(node|cpu|gres/gpu)(?::[\w.-]+)?=(\d+)(?=,|$)", fields.get(key, "")):
            if per_node[name]:
                counts.append(max(min(int(number), 1), int(number) // per_node[name]))
    return min(counts, default=None)


def _largest(values: Iterable[int | None]) -> int | None:
    """Return the largest value; None, which is no limit, if any is None."""
    found = list(values)
    return None if None in found else max(value for value in found if value is not None)


def smallest(limits: Iterable[tuple[int | None, str]]) -> tuple[int, str] | None:
    """Return the smallest of some values with their sources; None where no value is a limit."""
    return min(((value, source) for value, source in limits if value is not None), default=None)
