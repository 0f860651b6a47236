"""Finds and loads a run config and its site file (name in config/sites or a path), and resolves relative paths.

Every error is a UserError that names the key, the value, the limit and the remedy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from longhaul.config.field_types import FrozenModel
from longhaul.config.run_config import Config
from longhaul.config.shipped_files import KEY_LIST, data_root
from longhaul.config.site_config import Site
from longhaul.config.strict_yaml import read_yaml
from longhaul.config.validation_messages import shortened, validation_message
from longhaul.errors import UserError

SITES = data_root() / "config" / "sites"
M = TypeVar("M", bound=FrozenModel)


@dataclass(frozen=True)
class LoadedConfig:
    """A run config, its site, and the paths of both files."""

    config: Config
    site: Site
    path: Path
    site_path: Path

    @property
    def folder(self) -> Path:
        """Folder of the config file. Relative paths in the config are relative to it."""
        return self.path.parent

    def resolve(self, key: str, written: str) -> Path:
        """Return the absolute path of the value of `key`; a relative path is relative to the config file."""
        return absolute_path(key, written, self.folder)


def absolute_path(key: str, written: str, folder: Path) -> Path:
    """Return the absolute form of a path that is relative to `folder` or starts with ~.

    Raises:
        UserError: the path is invalid or cannot be accessed; the message names `key`.
    """
    try:
        path = (folder / Path(written).expanduser()).resolve()
        path.exists()
    except (OSError, RuntimeError) as error:  # pathlib raises RuntimeError for an unknown ~user and for a loop of links
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{key} {shortened(written)} is not a valid path: {reason}",
            "give the full path of a readable file or folder",
        ) from None
    return path


def load_config(path: Path) -> LoadedConfig:
    """Return a run's config and its site.

    Raises:
        UserError: one of the two files is missing or invalid.
    """
    config = read_model(path, Config)
    site_path = find_site(config.site, path.resolve().parent)
    return LoadedConfig(config, read_model(site_path, Site), path.resolve(), site_path)


def load_site(written: str, folder: Path) -> Site:
    """Return the site that find_site finds."""
    return read_model(find_site(written, folder), Site)


def names_a_file(written: str) -> bool:
    """Return whether the value of a key that takes a shipped file's name or a path is a path."""
    return "/" in written or written.endswith((".yaml", ".yml"))


def find_site(written: str, folder: Path) -> Path:
    """Return the file of the site with this name in config/sites, or this path relative to `folder`.

    A value with a slash or with the extension .yaml or .yml is a path.

    Raises:
        UserError: there is no such site or file.
    """
    if names_a_file(written):
        path = absolute_path("site", written, folder)
        if not path.exists():
            raise UserError(
                f"site: {path} does not exist; a relative path starts at the folder of the config",
                f"correct {shortened(written)}, or put the site file there",
            )
        return path
    names = sorted(file.stem for file in SITES.glob("*.yaml"))
    if written not in names:
        raise UserError(
            f"site: there is no site {shortened(written)}", f"use one of {', '.join(names)}, or the path of a site file"
        )
    return SITES / f"{written}.yaml"


def is_site_file(path: Path) -> bool:
    """Return whether a YAML file is a site file rather than a run config.

    Raises:
        UserError: the file is missing, or no YAML with keys and values.
    """
    keys = read_yaml(path).keys()
    return "partitions" in keys and "stages" not in keys


def read_model(path: Path, model: type[M]) -> M:
    """Return the YAML file `path` as an instance of `model`; raise UserError if it is invalid."""
    value = read_yaml(path)
    try:
        # YAML has no tuples. In JSON mode, pydantic's strict models accept lists for them.
        return model.model_validate_json(json.dumps(value))
    except ValidationError as error:
        raise UserError(validation_message(path, value, model, error), f"{KEY_LIST} lists all keys") from None
