"""Loads the plan of the run that a user names on the command line: by config, run folder or site file."""

from __future__ import annotations

from pathlib import Path

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.artifacts.paths import RunPaths
from longhaul.config.load_config import load_config
from longhaul.config.shipped_files import data_root
from longhaul.planning.plan import Plan, build_plan

DEMO = "demo"


def config_path(named: Path) -> Path:
    """Return the path of a run's config; the word `demo` stands for the demo that longhaul ships."""
    return data_root() / "config" / "config.yaml" if str(named) == DEMO else named


def load_plan(named: Path) -> Plan:
    """Return the plan of a run config, with what fetch has recorded.

    Raises:
        UserError: the first problem that would make the run fail.
    """
    loaded = load_config(config_path(named))
    lock = RunPaths(loaded.config.run).lock
    return build_plan(loaded, Lock.read(lock) if lock.exists() else None)
