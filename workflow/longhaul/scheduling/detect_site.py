"""Verb `longhaul site detect`: writes a first site file from Slurm's partitions, node shapes, accounts and interfaces.

With a probe, short jobs also read what Slurm does not know: the GPUs' memory, their driver, the networks of compute nodes.
"""

from __future__ import annotations

import getpass
import grp
import json
import os
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import psutil
import yaml
from pydantic import ValidationError

from longhaul.config.field_types import NAME_PATTERN, PATTERN_DESCRIPTIONS
from longhaul.config.site_config import Site
from longhaul.errors import UserError
from longhaul.scheduling import slurm_client
from longhaul.scheduling.compare_nodes_with_site import probe_requests
from longhaul.scheduling.fast_interfaces import fast_interfaces
from longhaul.scheduling.find_partitions import FoundCluster, FoundPartition, found_partitions
from longhaul.scheduling.probe_nodes import probe_nodes
from longhaul.scheduling.site_file_text import site_text
from longhaul.scheduling.slurm_limits import JobLimit, SlurmLimits, limits_of, read_limits, smallest


def detect_site(name: str, probe_minutes: float | None = None) -> str:
    """Return the text of a site file for this cluster, with a comment for what is not known.

    probe_minutes: how long to wait for one-minute probe jobs; None submits none

    Raises:
        UserError: the name is none of a site, Slurm does not answer, or shows no partition that is up.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"site {name!r} is no name", f"name another file; use {PATTERN_DESCRIPTIONS[NAME_PATTERN]}")
    try:
        shown = slurm_client.show_all("partition")
        here = [fields for fields in shown if _takes_jobs_from_here(fields.get("AllocNodes", "ALL"))]
        nodes = slurm_client.show_all("node")
    except slurm_client.SlurmCommandError as error:
        raise UserError(f"Slurm does not answer: {error}", "call this on a login node, and try again") from None
    settings = slurm_client.settings()
    partitions = found_partitions(here or shown, nodes, settings)
    associations = slurm_client.associations(getpass.getuser(), settings.get("ClusterName", ""))
    interfaces = fast_interfaces(psutil.net_if_addrs())
    limits = read_limits()
    qos = limits.qos if limits else {}
    not_up = [f"{one['PartitionName']} ({one['State']})" for one in here or shown if one.get("State", "UP") != "UP"]
    cluster = FoundCluster(partitions, settings, associations, _own_groups(), qos, interfaces, not_up)
    cluster = _within_limits(name, cluster, limits)
    if probe_minutes is not None and (site := _site(name, cluster)):
        cluster = replace(cluster, probes=probe_nodes(probe_requests(site, minutes=1), probe_minutes))
    return site_text(name, cluster)


def _takes_jobs_from_here(alloc_nodes: str) -> bool:
    """Return whether users may submit jobs from this machine; alloc_nodes: Slurm's list of such machines, or ALL."""
    if alloc_nodes in ("", "ALL", "(null)"):
        return True
    try:
        names = slurm_client.expand_node_list(alloc_nodes)
    except slurm_client.SlurmCommandError:
        names = alloc_nodes.split(",")
    return socket.gethostname().partition(".")[0] in {name.partition(".")[0] for name in names}


def _own_groups() -> set[str]:
    """Return the names of the user's groups, as AllowGroups of a partition lists them; without those that have no name."""
    names: set[str] = set()
    for number in {os.getegid(), *os.getgroups()}:
        with suppress(KeyError):
            names.add(grp.getgrgid(number).gr_name)
    return names


def _site(name: str, cluster: FoundCluster) -> Site | None:
    """Return the site that the text describes; None if Slurm shows a value that no site file may have.

    The file is written in either case; a command that loads it names the value.
    """
    try:
        return Site.model_validate_json(json.dumps(yaml.safe_load(site_text(name, cluster))))
    except ValidationError:
        return None


def _within_limits(name: str, cluster: FoundCluster, shown: SlurmLimits | None) -> FoundCluster:
    """Return the cluster with time limits and numbers of nodes that QOS and account allow, too."""
    site = _site(name, cluster)
    if site is None or shown is None:
        return cluster
    chosen = {partition.name: partition for partition in site.partitions}
    return replace(
        cluster,
        partitions=[
            _limited(partition, limits_of(chosen[partition.name], shown)) if partition.name in chosen else partition
            for partition in cluster.partitions
        ],
    )


def _limited(partition: FoundPartition, limits: Sequence[JobLimit]) -> FoundPartition:
    minutes = smallest((limit.minutes, limit.source) for limit in limits)
    nodes = smallest((limit.nodes, limit.source) for limit in limits)
    if minutes and 0 < minutes[0] < partition.longest_minutes:
        partition = replace(partition, max_minutes=minutes[0], limits_time=minutes[1])
    if nodes and 0 < nodes[0] < partition.max_nodes:
        partition = replace(partition, max_nodes=nodes[0], limits_nodes=nodes[1])
    return partition
