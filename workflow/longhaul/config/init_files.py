"""Verb `longhaul init`: copies an example config and a site file into the user's folder."""

from __future__ import annotations

import math
import re
from pathlib import Path

import yaml

from longhaul.artifacts.atomic_files import write_text
from longhaul.config.field_types import NAME_PATTERN, PATTERN_DESCRIPTIONS
from longhaul.config.load_config import SITES, find_site, load_config, load_site
from longhaul.config.shipped_files import data_root
from longhaul.config.site_config import Site
from longhaul.errors import UserError

EXAMPLES = data_root() / "config" / "examples"


def names_in(folder: Path) -> list[str]:
    """Return the names of the YAML files in a folder, without suffix."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def copy_start_files(example: str, site: str, run: str, folder: Path) -> tuple[Path, Path]:
    """Write <run>.yaml and <site>.yaml into `folder`, and return their paths. The config names the site file and the run.

    The stages keep their number of GPUs, on as many nodes of the site as that needs.

    site: the name of a shipped site, or the path of a site file, which is used where it is

    Raises:
        UserError: there is no such example or site, a file exists already, or a name or the site file is invalid.
    """
    check_run(run)
    check_example(example)
    check_site(site, folder)
    config, found_site = folder / f"{run}.yaml", find_site(site, folder)
    is_shipped = found_site.parent == SITES
    site_file = folder / found_site.name if is_shipped else found_site
    # The example's own paths are relative to its folder.
    text = (EXAMPLES / f"{example}.yaml").read_text(encoding="utf-8").replace(" ../../", f" {data_root()}/")
    text = _fitted(text, load_site(site, folder))
    if site_file == config:
        raise UserError(f"the run and the site would both be {config}", "choose another run name")
    if config.exists():
        raise UserError(f"{config} exists already", "choose another run name, or move the file away")
    if is_shipped and site_file.exists():
        raise UserError(f"{site_file} exists already", f"use it with --site ./{site_file.name}, or move it away")
    new = {config: _with_values(text, run=run, site=f"./{site_file.name}" if is_shipped else site)}
    if is_shipped:
        new[site_file] = found_site.read_text(encoding="utf-8")
    for path, content in new.items():
        write_text(path, content)
    load_config(config)
    return config, site_file


def check_example(name: str) -> None:
    """Raise UserError if there is no such example."""
    if name not in names_in(EXAMPLES):
        raise UserError(f"there is no example {name!r}", f"use one of {', '.join(names_in(EXAMPLES))}")


def check_site(written: str, folder: Path) -> None:
    """Raise UserError if there is no such site, or the site file is missing or invalid."""
    load_site(written, folder)


def check_run(name: str) -> None:
    """Raise UserError if this is no name of a run."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"run {name!r} is no name", f"use {PATTERN_DESCRIPTIONS[NAME_PATTERN]}")


def _fitted(text: str, site: Site) -> str:
    """Return the config with stages of the same number of GPUs on nodes of the site, within its time limit."""
    gpus, limit = site.node.gpus, site.partition_for("gpu").max_minutes

    def on_nodes_of_the_site(match: re.Match[str]) -> str:
        nodes, between, per_node = int(match[1]), match[2], int(match[3])
        if not gpus or per_node <= gpus or nodes * per_node % gpus:
            return match[0]
        return f"nodes: {nodes * per_node // gpus}{between}gpus_per_node: {gpus}"

    text = re.sub(r"\bnodes: (\d+)(, |\n +)gpus_per_node: (\d+)", on_nodes_of_the_site, text)
    return re.sub(r"\bminutes: (\d+)", lambda match: f"minutes: {min(int(match[1]), limit or int(match[1]))}", text)


def _with_values(text: str, **values: str) -> str:
    """Return the config with other values of top-level keys that stand on lines of their own."""
    for key, value in values.items():
        # YAML puts 123 in quotes, which would be a number, and names with # or a colon.
        line = yaml.safe_dump({key: value}, allow_unicode=True, width=math.inf).rstrip()
        text = re.sub(rf"^{key}: .*$", lambda _, line=line: line, text, count=1, flags=re.MULTILINE)
    return text
