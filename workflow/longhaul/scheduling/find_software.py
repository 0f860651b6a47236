"""Looks for the image or environment that `software` of the site file names, before a job waits in the queue for it."""

from __future__ import annotations

import sys
from pathlib import Path

from longhaul.config.site_config import Site
from longhaul.errors import UserError
from longhaul.scheduling.compare_nodes_with_site import Comparison

_PLACEHOLDER = "/path/to/"
"""Beginning of the paths in shipped site files."""
_FILE_OPTIONS = ("--container-image=", "--environment=")


def missing_software(site: Site) -> list[str]:
    """Return the paths below `software` that do not exist on this machine."""
    software = site.software
    paths = [option.partition("=")[2] for option in software.options if option.startswith(_FILE_OPTIONS)]
    if software.kind == "container":
        paths = [str(software.path)]
    elif software.kind in ("venv", "conda"):
        paths = [f"{software.path}/bin/python"]
    return [path for path in paths if path.startswith("/") and not Path(path).exists()]


def require_software(site: Site) -> None:
    """Refuse software that no job can find; print a warning where compute nodes may have what this machine has not.

    Raises:
        UserError: a path is a placeholder, or is missing on the machine on which the jobs run.
    """
    for path in missing_software(site):
        if _is_placeholder(path):
            raise UserError(f"software: {path} is the placeholder of a shipped site file", _remedy(site))
        if site.scheduler == "local":
            raise UserError(f"software: {path} does not exist", _remedy(site))
        print(f"warning: software: {path} does not exist on this machine; jobs need it on their nodes", file=sys.stderr)


def compare_software(site: Site) -> list[Comparison]:
    """Return a line for each missing path; a problem where it is a placeholder."""
    return [
        Comparison("all", "software", path, "not on this machine", _remedy(site) if _is_placeholder(path) else "")
        for path in missing_software(site)
    ]


def _is_placeholder(path: str) -> bool:
    return path.startswith(_PLACEHOLDER)


def _remedy(site: Site) -> str:
    what = "environment" if site.software.kind in ("venv", "conda") else "image or of its description"
    return f"write the path of your {what} into software of the site file"
