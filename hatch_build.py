"""Build hook: puts the files that the package needs beside its code into the wheel, as longhaul/share."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHARED = (
    "Snakefile",
    "workflow/Snakefile",
    "workflow/rules",
    "templates",
    "profiles",
    "config/config.yaml",
    "config/default.yaml",
    "config/evaluation",
    "config/examples",
    "config/sites",
    "docs/config.md",
    "docs/how-to",
    "envs/constraints.txt",
)


class SharedFiles(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files to a standard wheel; an editable one finds them in the checkout."""
        if version == "standard":
            build_data["force_include"].update({path: f"longhaul/share/{path}" for path in SHARED})
