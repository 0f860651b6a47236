"""The fields of a checkpoint's manifest.json for tests that write checkpoint folders themselves."""

from __future__ import annotations

from typing import Any

from longhaul.train.checkpoint.checkpoint_folders import SCHEMA_VERSION

ANY_HASH = "0" * 64


def manifest_fields(files: dict[str, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Return a complete manifest of `files`: name -> {"bytes", "blake3"}."""
    return {
        "schema_version": SCHEMA_VERSION,
        "step": 1,
        "validation_loss": None,
        "has_reference_values": False,
        "world_size": 1,
        "zero_stage": 0,
        "offload_optimizer": "none",
        "parallel": {},
        "files": files,
        **changes,
    }
