"""Computes the steps of `epochs`: passes over the samples by the global batch; the plan's estimate of them.

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
    path = plan.paths.manifest(stage.dataset)
    if stage.epochs is None or not path.exists():
        return None
    try:
        manifest = DataManifest.read(path)
        parts = [DataManifest.from_fields(part["manifest"]) for part in manifest.mixture] or [manifest]
    except (UserError, ValueError):  # the job that reads it reports it
        return None
    tokens = [part.splits["train"]["tokens"] for part in parts]
    if stage.kind == "pretrain":
        samples = sum(window_count(count, stage.sequence_length) for count in tokens)
    else:
        samples = sum(math.ceil(count / stage.sequence_length) for count in tokens)
    return steps_of_epochs(stage.epochs, samples, stage.global_batch_size) or None
