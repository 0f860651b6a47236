"""Finds out whether the quarantine leaves too few nodes for a job: which nodes it excludes, why, and what helps."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from longhaul.artifacts.paths import JobFolder
from longhaul.artifacts.quarantine import quarantine_reasons, quarantined_nodes
from longhaul.errors import UserError
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.scheduling import slurm_client


@dataclass(frozen=True)
class NodeShortage:
    """Too few nodes for a job.

    numbers: how many nodes the job needs, and how many are left
    nodes:   names of the quarantined nodes, with reasons
    remedy:  what gives the job enough nodes
    """

    numbers: str
    nodes: str
    remedy: str

    @property
    def cause(self) -> str:
        return f"{self.numbers}: {self.nodes}"

    def after(self, cause: str, remedy: str) -> tuple[str, str]:
        """Return cause and remedy of a failure together with those of the shortage, unless they have them already.

        The numbers come first, as a check may have found much.
        """
        if self.numbers in cause:
            return cause, remedy
        separator = "\n" if "\n" in cause else "; "
        remedies = filter(None, (remedy, self.remedy, "then run the same command again to resume"))
        return separator.join(filter(None, (self.cause, cause))), "; ".join(remedies)


def find_shortage(
    partition: str | None, needed: int, quarantine: Path, explained: Iterable[str] = ()
) -> NodeShortage | None:
    """Return why a partition has too few nodes; None if it has enough, or if Slurm does not say how many it has.

    quarantine: path of quarantine.json
    explained:  nodes that the job may not use for a reason that the caller states; they may be missing in quarantine.json
    """
    explained = set(explained)
    gone = {*quarantined_nodes(quarantine), *explained}
    nodes = slurm_client.partition_nodes(partition) if gone and partition else []
    left = [node for node in nodes if node not in gone]
    if not nodes or len(left) >= needed:
        return None
    missing = [node for node in nodes if node in gone]
    wanted = "1 node is needed" if needed == 1 else f"{needed} nodes are needed"
    lost = "1 is quarantined" if len(missing) == 1 else f"{len(missing)} are quarantined"
    numbers = f"{wanted}; partition {partition} has {len(nodes)}, of which {lost}"
    return NodeShortage(
        numbers, quarantine_text(quarantine, missing, explained), shortage_remedy(quarantine, len(left))
    )


def shortage_of_job(folder: Path, partition: str | None) -> NodeShortage | None:
    """Return why a partition has too few nodes for a job; None as find_shortage, and for jobs without Slurm.

    folder: the job's, with its launch spec
    """
    try:
        job = LaunchSpec.read(JobFolder(folder).launch_spec)
    except UserError:
        return None
    return find_shortage(partition, job.nodes, Path(job.quarantine)) if job.slurm else None


def quarantine_text(quarantine: Path, nodes: Iterable[str], explained: Container[str] = ()) -> str:
    """Return the names of nodes with the reasons of those that have one. explained: nodes whose reason is left out"""
    reasons = {node: text for node, text in quarantine_reasons(quarantine).items() if node not in explained}
    return ", ".join(f"{node} ({reasons[node]})" if reasons.get(node) else node for node in nodes)


def shortage_remedy(quarantine: Path, left: int | None = None) -> str:
    """Return what to do. left: number of nodes that a job can have; None if it is unknown."""
    fewer = "fewer nodes" if left is None else f"at most {left} node{'s' * (left != 1)}"
    lower = "" if left == 0 else f"ask for {fewer} in the config, "
    return (
        f"remove repaired nodes from {quarantine} (longhaul nodes --release NODE), {lower}"
        "or name a partition with spare nodes in the site file"
    )
