"""Finds the Snakefile, rules, templates, site files, profiles and constraints, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# pyproject.toml copies the checkout's folders there when it builds a wheel.
_INSTALLED = PACKAGE / "share"


def is_installed() -> bool:
    """Return whether the package runs from an installed wheel instead of a checkout."""
    return _INSTALLED.is_dir()


def data_root() -> Path:
    """Return the folder that holds Snakefile, workflow/, templates/, config/, profiles/ and envs/.

    This is the repository root in a checkout, and longhaul/share in an installed wheel.
    """
    return _INSTALLED if is_installed() else PACKAGE.parents[1]


CHAT_TEMPLATES = data_root() / "templates" / "chat"
"""Chat templates that mark the assistant's turns. Messages name the full path: a config names paths relative to itself."""
CONSTRAINTS = data_root() / "envs" / "constraints.txt"
"""The tested versions of all packages, for `pip install -c`."""
KEY_LIST = data_root() / "docs" / "config.md"
"""The page with all keys of run configs and site files. Messages name its full path, as a wheel has it elsewhere."""
