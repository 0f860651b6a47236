"""The rates that healthy nodes of a site usually reach; `longhaul baseline` writes them beside the site file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Artifact


class UsualRate(TypedDict):
    """Rates of one kind over all GPUs or nodes of a run."""

    median: float
    lowest: float
    highest: float
    count: int


@dataclass(frozen=True)
class SiteBaseline(Artifact):
    """`<site file>.baseline.json`.

    gpu:   name of the GPUs; "" on nodes without GPUs
    run:   the run whose checks measured the rates
    time:  when that was, in UTC
    rates: name of a rate in RATE_CHECKS -> its values
    network: name of checks.network_baseline.NetworkRate -> its values; empty if the fabric check had not run
    gpu_pairs: what connects two GPUs of a node, NVLink or SYS -> rates of copies between them in GB/s
    """

    hint: ClassVar[str] = "delete it, or measure again: longhaul baseline"

    gpu: str
    run: str
    time: str
    rates: dict[str, UsualRate]
    network: dict[str, UsualRate] = field(default_factory=dict)
    gpu_pairs: dict[str, UsualRate] = field(default_factory=dict)


def baseline_path(site_path: Path) -> Path:
    """Return the path of the baseline of a site file."""
    return site_path.with_suffix(".baseline.json")


def read_baseline(site_path: Path) -> SiteBaseline | None:
    """Return the baseline of a site; None if it has none.

    Raises:
        UserError: the file is damaged or of another release.
    """
    path = baseline_path(site_path)
    return SiteBaseline.read(path) if path.exists() else None
