"""Compares max_minutes and max_nodes of a site file, or the jobs of a run, with the limits of partitions, QOS and account.

sbatch accepts jobs beyond a limit where EnforcePartLimits is NO or a QOS lacks DenyOnLimit, and they wait for ever.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from longhaul.config.partition_config import Partition
from longhaul.config.site_config import Site
from longhaul.errors import UserError
from longhaul.planning.slurm_request import SlurmRequest
from longhaul.scheduling import slurm_client
from longhaul.scheduling.compare_nodes import Comparison
from longhaul.scheduling.find_partitions import minutes_of

_JOB_TRES = ("MaxTRES", "MaxTRESPU", "MaxTRESPA", "GrpTRES")
_QOS_FIELDS = ("Name", "MaxWall", *_JOB_TRES, "Flags")
_ASSOCIATION_FIELDS = ("Account", "Partition", "MaxWall", "MaxTRES", "GrpTRES")
Fields = Mapping[str, str]


@dataclass(frozen=True)
class SlurmLimits:
    """What Slurm shows: partitions and QOS by name, and the user's associations on this cluster."""

    partitions: Mapping[str, Fields]
    qos: Mapping[str, Fields]
    associations: Sequence[Fields]


@dataclass(frozen=True)
class _Limit:
    """A limit of one job. None: there is no limit."""

    source: str
    minutes: int | None
    nodes: int | None


def compare_limits(site: Site, requests: Sequence[SlurmRequest] | None = None) -> list[Comparison]:
    """Return two lines for each partition of the site file; [] if Slurm does not answer.

    requests: those of a run's jobs, whose nodes and minutes are compared then; None: what the site file allows
    """
    try:
        partitions = slurm_client.show_all("partition")
    except (slurm_client.SlurmCommandError, UserError):
        return []
    cluster = slurm_client.settings().get("ClusterName", "")
    conditions = slurm_client.association_filter(getpass.getuser(), cluster)
    limits = SlurmLimits(
        {fields["PartitionName"]: fields for fields in partitions},
        {fields["Name"]: fields for fields in slurm_client.accounting_rows("qos", fields=_QOS_FIELDS)},
        slurm_client.accounting_rows("assoc", *conditions, fields=_ASSOCIATION_FIELDS),
    )
    lines: list[Comparison] = []
    for partition in site.partitions:
        if requests is None:
            lines += compare_partition(partition, limits)
        elif own := [request for request in requests if _is_for(request, partition)]:
            lines += compare_partition(partition, limits, own)
    return lines


def _is_for(request: SlurmRequest, partition: Partition) -> bool:
    wanted = (request.partition, request.account, request.qos, request.constraint)
    return wanted == (partition.name, partition.account, partition.qos, partition.constraint)


def compare_partition(
    partition: Partition, shown: SlurmLimits, requests: Sequence[SlurmRequest] = ()
) -> Iterator[Comparison]:
    """Yield a line for each limit of a partition of the site file, and one for a partition or QOS that Slurm does not show.

    requests: as for `compare_limits`; none: what the site file allows
    """
    place, names = partition.jobs[0], (partition.name or "").split(",")
    for name in names:
        if name and name not in shown.partitions:
            yield Comparison(place, "partition", name, "unknown", "correct name of the partition; sinfo -s lists them")
    if partition.qos and shown.qos and partition.qos not in shown.qos:
        yield Comparison(place, "QOS", partition.qos, "unknown", "correct qos; sacctmgr show qos lists them")
    limits = list(_limits(partition, [shown.partitions[name] for name in names if name in shown.partitions], shown))
    minutes = max((request.minutes for request in requests), default=partition.max_minutes)
    nodes = max((request.nodes for request in requests), default=partition.max_nodes)
    prefix = "" if requests else "max_"
    if minutes is not None:
        yield _line(place, f"{prefix}minutes", minutes, [(limit.minutes, limit.source) for limit in limits])
    yield _line(place, f"{prefix}nodes", nodes, [(limit.nodes, limit.source) for limit in limits])


def _limits(partition: Partition, own: Sequence[Fields], shown: SlurmLimits) -> Iterator[_Limit]:
    names = dict.fromkeys([partition.qos or "", *(fields.get("QoS", "") for fields in own)])
    found = [shown.qos[name] for name in names if name in shown.qos]
    flags = {flag for qos in found for flag in qos["Flags"].split(",")}
    if own:
        # A job may start in any of several partitions. Two flags of a QOS replace the limits of its partition.
        minutes = None if "PartitionTimeLimit" in flags else _largest(minutes_of(one.get("MaxTime", "")) for one in own)
        nodes = None if "PartitionMaxNodes" in flags else _largest(_partition_nodes(one) for one in own)
        yield _Limit(f"partition {partition.name}", minutes, nodes)
    for qos in found:
        yield _Limit(f"QOS {qos['Name']}", minutes_of(qos["MaxWall"]), _nodes(qos, partition))
    for association in shown.associations:
        if association["Account"] == partition.account and association["Partition"] in ("", partition.name):
            minutes, nodes = minutes_of(association["MaxWall"]), _nodes(association, partition)
            yield _Limit(f"account {partition.account}", minutes, nodes)


def _partition_nodes(fields: Fields) -> int | None:
    counts = [int(fields[key]) for key in ("MaxNodes", "TotalNodes") if fields.get(key, "").isdigit()]
    return min(counts, default=None)


def _nodes(fields: Fields, partition: Partition) -> int | None:
    """Return how many whole nodes the limits of trackable resources (TRES) allow: cpu=1280,gres/gpu=64,node=16."""
    per_node = {"node": 1, "cpu": partition.node.cpus, "gres/gpu": partition.node.gpus}
    counts = []
    for key in _JOB_TRES:
        for name, number in re.findall(r"(?:^|,)(node|cpu|gres/gpu)(?::[\w.-]+)?=(\d+)(?=,|$)", fields.get(key, "")):
            if per_node[name]:
                counts.append(int(number) // per_node[name])
    return min(counts, default=None)


def _largest(values: Iterable[int | None]) -> int | None:
    """Return the largest value; None, which is no limit, if any is None."""
    found = list(values)
    return None if None in found else max(value for value in found if value is not None)


def _line(place: str, key: str, written: int, limits: Sequence[tuple[int | None, str]]) -> Comparison:
    known = [(value, source) for value, source in limits if value is not None]
    if not known:
        return Comparison(place, key, str(written), "no limit is shown")
    value, source = min(known)
    problem = f"set {key} to at most {value}; jobs beyond the limit of {source} never start" if written > value else ""
    return Comparison(place, key, str(written), f"{value} ({source})", problem)
