"""Compares max_minutes and max_nodes of a site file, or the jobs of a run, with the limits of partitions, QOS and account.

sbatch accepts jobs beyond a limit where EnforcePartLimits is NO or a QOS lacks DenyOnLimit, and they wait without end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longhaul.config.partition_config import Partition
from longhaul.config.site_config import Site
from longhaul.planning.slurm_request import SlurmRequest
from longhaul.scheduling.compare_nodes_with_site import Comparison
from longhaul.scheduling.slurm_limits import (
    MinutesLimit,
    SlurmLimits,
    fewest_nodes,
    limits_of,
    minutes_limits_of,
    most_memory,
    names_of,
    read_limits,
    smallest,
    state,
)


def compare_limits(site: Site, requests: Sequence[SlurmRequest] | None = None) -> list[Comparison]:
    """Return two lines for each partition of the site file; [] if Slurm does not answer.

    requests: those of a run's jobs, whose nodes and minutes are compared then; None: what the site file allows
    """
    limits = read_limits()
    if limits is None:
        return []
    lines: list[Comparison] = []
    for partition in site.partitions:
        if requests is None:
            lines += compare_partition(partition, limits)
            lines += _nodes_of_smallest_job(partition, limits, _smallest_job(site, partition))
        elif own := [request for request in requests if _is_for(request, partition)]:
            lines += compare_partition(partition, limits, own)
            lines += _nodes_of_smallest_job(partition, limits, min(request.nodes for request in own))
    return lines


def _smallest_job(site: Site, partition: Partition) -> int:
    """Return the nodes of the smallest job that surely runs in a partition. Those of stages and checks are not known here."""
    has_cpu_jobs = partition in (site.partition_for("cpu"), site.partition_for("login"))
    return 1 if has_cpu_jobs else partition.max_nodes


def _nodes_of_smallest_job(partition: Partition, shown: SlurmLimits, nodes: int) -> Iterator[Comparison]:
    """Yield a line where the partitions refuse small jobs (MinNodes)."""
    fewest = fewest_nodes(partition, shown)
    if fewest > 1:
        remedy = (
            f"jobs on fewer than {fewest} nodes never start there; give the stage or check at least {fewest} nodes, and jobs "
            "cpu and login a partition that takes one node"
        )
        found = f"{fewest} (partition {partition.name})"
        yield Comparison(partition.jobs[0], "nodes at least", str(nodes), found, remedy if nodes < fewest else "")


def _is_for(request: SlurmRequest, partition: Partition) -> bool:
    wanted = (request.partition, request.account, request.qos, request.constraint)
    return wanted == (partition.name, partition.account, partition.qos, partition.constraint)


def compare_partition(
    partition: Partition, shown: SlurmLimits, requests: Sequence[SlurmRequest] = ()
) -> Iterator[Comparison]:
    """Yield a line for time, nodes, memory and each limit of resources times minutes of a partition of the site file, and one
    for a partition or QOS that Slurm does not show, or a partition that is not up.

    requests: as for `compare_limits`; none: what the site file allows
    """
    place = partition.jobs[0]
    for name in names_of(partition):
        if name not in shown.partitions:
            yield Comparison(place, "partition", name, "unknown", "correct name of the partition; sinfo -s lists them")
    if partition.qos and shown.qos and partition.qos not in shown.qos:
        yield Comparison(place, "QOS", partition.qos, "unknown", "correct qos; sacctmgr show qos lists them")
    if (found := state(partition, shown)) != "UP":
        remedy = (
            f"jobs of partition {partition.name} do not start before the centre opens it; name another one, or wait"
        )
        yield Comparison(place, "state", "UP", found, remedy)
    yield from _memory_line(partition, shown, requests)
    limits = limits_of(partition, shown)
    minutes = max((request.minutes for request in requests), default=partition.max_minutes)
    nodes = max((request.nodes for request in requests), default=partition.max_nodes)
    prefix = "" if requests else "max_"
    if minutes is not None:
        yield _line(place, f"{prefix}minutes", minutes, [(limit.minutes, limit.source) for limit in limits])
    yield _line(place, f"{prefix}nodes", nodes, [(limit.nodes, limit.source) for limit in limits])
    for limit in minutes_limits_of(partition, shown):
        yield _minutes_line(partition, limit, requests) if requests else _minutes_of_all_nodes(partition, limit)


def _memory_line(partition: Partition, shown: SlurmLimits, requests: Sequence[SlurmRequest]) -> Iterator[Comparison]:
    of_file = partition.node.memory_mb if partition.memory == "per_node" else 0
    asked = max((request.memory_mb or 0 for request in requests), default=of_file)
    most = most_memory(partition, shown)
    if asked and most is not None:
        source = f"partition {partition.name}"
        remedy = f"set node.memory_mb to at most {most}; jobs beyond the limit of {source} never start"
        yield Comparison(
            partition.jobs[0], "memory, MiB", str(asked), f"{most} ({source})", remedy if asked > most else ""
        )


def _minutes_line(partition: Partition, limit: MinutesLimit, requests: Sequence[SlurmRequest]) -> Comparison:
    most = max(_amount(request, partition, limit.resource) * request.minutes for request in requests)
    remedy = (
        f"reduce nodes or minutes of the job to at most {limit.minutes} {limit.resource} minutes together; jobs beyond the limit "
        f"of {limit.source} do not start, or end at it"
    )
    found = f"{limit.minutes} ({limit.source})"
    return Comparison(partition.jobs[0], _subject(limit), str(most), found, remedy if most > limit.minutes else "")


def _minutes_of_all_nodes(partition: Partition, limit: MinutesLimit) -> Comparison:
    """Return how long a job on max_nodes runs at most. The site file has no key for this limit, so it is no problem of it."""
    amount = partition.max_nodes * _per_node(partition, limit.resource)
    most = limit.minutes // amount if amount else limit.minutes
    found = f"{limit.minutes} ({limit.source}): at most {most} minutes on {partition.max_nodes} nodes"
    return Comparison(partition.jobs[0], _subject(limit), "-", found)


def _subject(limit: MinutesLimit) -> str:
    return f"{limit.resource} minutes"


def _per_node(partition: Partition, resource: str) -> int:
    return {"node": 1, "cpu": partition.node.cpus, "gres/gpu": partition.node.gpus}[resource]


def _amount(request: SlurmRequest, partition: Partition, resource: str) -> int:
    """Return how much of a resource Slurm counts for a job; of an exclusive node all."""
    if resource == "node" or request.exclusive:
        return request.nodes * _per_node(partition, resource)
    return request.tasks * request.cpus_per_task if resource == "cpu" else request.nodes * request.gpus_per_node


def _line(place: str, key: str, written: int, limits: Sequence[tuple[int | None, str]]) -> Comparison:
    found = smallest(limits)
    if found is None:
        return Comparison(place, key, str(written), "no limit is shown")
    value, source = found
    remedy = f"set {key} to at most {value}" if value else "name another account, QOS or partition"
    problem = f"{remedy}; jobs beyond the limit of {source} never start" if written > value else ""
    return Comparison(place, key, str(written), f"{value} ({source})", problem)
