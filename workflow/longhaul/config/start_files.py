"""Verb `longhaul init`: copies an example config and a site file into the user's folder."""

from __future__ import annotations

import re
from pathlib import Path

from longhaul.artifacts.atomic_files import write_text
from longhaul.config.field_types import NAME_PATTERN, PATTERN_DESCRIPTIONS
from longhaul.config.load_config import SITES, load_config
from longhaul.config.shipped_files import data_root
from longhaul.errors import UserError

EXAMPLES = data_root() / "config" / "examples"


def names_in(folder: Path) -> list[str]:
    """Return the names of the YAML files in a folder, without suffix."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def copy_start_files(example: str, site: str, run: str, folder: Path) -> tuple[Path, Path]:
    """Write <run>.yaml and <site>.yaml into `folder`, and return their paths. The config names the site file and the run.

    site: the name of a shipped site, or the path of a site file, which is used where it is

    Raises:
        UserError: there is no such example or site, a file exists already, or a name is invalid.
    """
    if not re.fullmatch(NAME_PATTERN, run):
        raise UserError(f"run {run!r} is no name", f"use {PATTERN_DESCRIPTIONS[NAME_PATTERN]}")
    config = folder / f"{run}.yaml"
    is_path = "/" in site or site.endswith((".yaml", ".yml"))
    site_file = Path(site) if is_path else folder / f"{site}.yaml"
    # The example's own paths are relative to its folder.
    text = _shipped("example", EXAMPLES, example).replace(" ../../", f" {data_root()}/")
    new = {config: _with_values(text, run=run, site=str(site_file) if is_path else f"./{site}.yaml")}
    if not is_path:
        new[site_file] = _shipped("site", SITES, site)
    for path in new:
        if path.exists():
            raise UserError(f"{path} exists already", "choose another run name, or move the file away")
    for path, content in new.items():
        write_text(path, content)
    load_config(config)
    return config, site_file


def _shipped(kind: str, folder: Path, name: str) -> str:
    if name not in names_in(folder):
        raise UserError(f"there is no {kind} {name!r}", f"use one of {', '.join(names_in(folder))}")
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")


def _with_values(text: str, **values: str) -> str:
    """Return the config with other values of top-level keys that stand on lines of their own."""
    for key, value in values.items():
        text = re.sub(rf"^{key}: .*$", lambda _, line=f"{key}: {value}": line, text, count=1, flags=re.MULTILINE)
    return text
