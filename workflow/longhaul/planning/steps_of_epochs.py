"""Computes the steps of `epochs`, passes over the samples by the global batch; the plan's estimates of steps and epochs.

Nobody knows the number of samples before the data are tokenized. The plan estimates the steps from the manifest of an earlier
run; the training job computes them once and records them in identity.json of the weights folder.
"""

from __future__ import annotations

import math
from decimal import Decimal

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError
from longhaul.planning.plan import Plan


def steps_of_epochs(epochs: float, samples: int, global_batch_size: int) -> int:
    """Return epochs x samples / global batch, rounded up to whole steps. Decimals count as they are written.

    samples: windows or packs of the training split; of a mixture, the sum over its datasets
    """
    return math.ceil(Decimal(str(epochs)) * samples / global_batch_size)


def window_count(tokens: int, sequence_length: int) -> int:
    """Return the number of windows of a token stream: each token but the first is predicted once."""
    return max(0, -(-(tokens - 1) // sequence_length))


def estimate_steps(plan: Plan, stage: Stage) -> int | None:
    """Return about how many steps a stage with `epochs` has; None without a manifest of its dataset.

    The windows of a pretraining are counted exactly. Packs are counted as if they had no padding.
    """
    if stage.epochs is None:
        return None
    samples = sum(_sample_count(part, stage) for _, part in _weighted_parts(plan, stage))
    return steps_of_epochs(stage.epochs, samples, stage.global_batch_size) or None


def estimate_epochs(plan: Plan, stage: Stage, steps: int) -> dict[str, float]:
    """Return by dataset about how many of its epochs these steps are; {} without a manifest of the stage's dataset.

    The weights of a mixture divide the samples of all steps. The counts are those of `estimate_steps`.
    """
    parts = _weighted_parts(plan, stage)
    drawn, weights = steps * stage.global_batch_size, sum(weight for weight, _ in parts)
    counts = [(part.dataset, weight, _sample_count(part, stage)) for weight, part in parts]
    return {name: drawn * weight / weights / samples for name, weight, samples in counts if samples}


def _weighted_parts(plan: Plan, stage: Stage) -> list[tuple[int, DataManifest]]:
    """Return weight and manifest of each dataset of a stage; [] where the manifest is missing or cannot be read."""
    path = plan.paths.manifest(stage.dataset)
    if not path.exists():
        return []
    try:
        manifest = DataManifest.read(path)
        parts = [(part["weight"], DataManifest.from_fields(part["manifest"])) for part in manifest.mixture]
    except (UserError, ValueError):  # the job that reads it reports it
        return []
    return parts or [(1, manifest)]


def _sample_count(manifest: DataManifest, stage: Stage) -> int:
    tokens = manifest.splits["train"]["tokens"]
    if stage.kind == "pretrain":
        return window_count(tokens, stage.sequence_length)
    return math.ceil(tokens / stage.sequence_length)
