"""Checks, as far as this machine can tell, that the Python of the site's inference engine exists and has its packages."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from longhaul.config.shipped_files import CONSTRAINTS
from longhaul.config.site_config import Site
from longhaul.config.site_serving_config import ENGINE_PACKAGES, EngineName
from longhaul.errors import UserError


def check_engine(site: Site) -> None:
    """Raise UserError if the site's engine is missing.

    A command other than a path, and the packages of another environment, can only be tried where jobs run.
    """
    serving = site.serving
    if serving.python and Path(serving.python[0]).is_absolute() and not shutil.which(serving.python[0]):
        raise UserError(
            f"site {site.name}, serving.python: {serving.python[0]} is no program on this machine",
            f"install {serving.engine} there, or correct serving.python in the site file",
        )
    if serving.python or site.software.kind != "current":
        return
    if missing := next((name for name in ENGINE_PACKAGES[serving.engine] if find_spec(name) is None), None):
        raise missing_package(serving.engine, missing, "this Python")


def missing_package(engine: EngineName, package: str, python: str) -> UserError:
    """Return the error for a package that an engine needs and its Python does not have."""
    own = f"install {engine} in an environment of its own, and set serving.python in the site file to its Python"
    return UserError(
        f"serving.engine {engine} needs the package {package}, which {python} does not have",
        f"pip install -c {CONSTRAINTS} 'longhaul[serve]'" if engine == "transformers" else own,
    )
