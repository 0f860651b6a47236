"""Verb `longhaul site detect`: writes a first site file from Slurm's partitions, node shapes, accounts and interfaces.

With a probe, short jobs also read what Slurm does not know: the GPUs' memory, their driver, the networks of compute nodes.
"""

from __future__ import annotations

import getpass
import json
from dataclasses import replace

import psutil
import yaml

from longhaul.config.site_config import Site
from longhaul.errors import UserError
from longhaul.scheduling import slurm_client
from longhaul.scheduling.compare_nodes import probe_requests
from longhaul.scheduling.find_partitions import FoundCluster, fast_interfaces, found_partitions
from longhaul.scheduling.probe_nodes import probe_nodes
from longhaul.scheduling.site_file_text import site_text


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
    settings = slurm_client.settings()
    associations = slurm_client.associations(getpass.getuser(), settings.get("ClusterName", ""))
    interfaces = fast_interfaces(psutil.net_if_addrs())
    cluster = FoundCluster(partitions, settings, associations, interfaces)
    if probe_minutes is not None:
        site = Site.model_validate_json(json.dumps(yaml.safe_load(site_text(name, cluster))))
        cluster = replace(cluster, probes=probe_nodes(probe_requests(site, minutes=1), probe_minutes))
    return site_text(name, cluster)
