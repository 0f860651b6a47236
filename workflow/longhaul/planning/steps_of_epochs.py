"""Computes the steps of `epochs`, passes over the samples by the global batch; the plan's estimates of steps and epochs.

Nobody knows the number of samples before the data are tokenized. The plan estimates the steps from the manifest of an earlier
run; the training job computes them once and records them in identity.json of the weights folder.
"""

from __future__ import annotations

import math
from decimal import Decimal

from longhaul.artifacts.artifact_schemas import ConversationCounts, DataManifest, KeptConversations
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
    """Return about how many steps a stage with `epochs` has; None where the samples of its dataset are not known.

    The windows of a pretraining are counted exactly. Packs are counted as if they had no padding.
    """
    if stage.epochs is None:
        return None
    counts = [_sample_count(plan, part, stage) for _, part in _weighted_parts(plan, stage)]
    if None in counts:
        return None
    return steps_of_epochs(stage.epochs, sum(filter(None, counts)), stage.global_batch_size) or None


def estimate_epochs(plan: Plan, stage: Stage, steps: int, padding: float) -> dict[str, float]:
    """Return by dataset about how many of its epochs these steps are, without datasets whose samples are not known.

    The weights of a mixture divide the samples of all steps. padding: share of the positions in packs, as
    far as it is known.
    """
    parts = _weighted_parts(plan, stage)
    drawn, weights = steps * stage.global_batch_size * (1 - padding), sum(weight for weight, _ in parts)
    counts = [(part.dataset, weight, _sample_count(plan, part, stage)) for weight, part in parts]
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


def kept_conversations(plan: Plan, stage: Stage) -> list[KeptConversations]:
    """Return what the stage keeps of the training conversations, one of each dataset; [] where they are not counted."""
    counts = [_kept(plan, part, stage) for _, part in _weighted_parts(plan, stage)]
    return [] if None in counts else list(filter(None, counts))


def _kept(plan: Plan, manifest: DataManifest, stage: Stage) -> KeptConversations | None:
    """Return what the stage keeps of these conversations; None where it is not counted, or of other data or settings."""
    path = plan.paths.conversation_counts(manifest.dataset)
    if not path.exists():
        return None
    try:
        counted = ConversationCounts.read(path)
    except UserError:  # the job that writes it writes it again
        return None
    counts = counted.splits.get("train", []) if counted.data_hash == manifest.hash else []
    settings = stage.sequence_length, stage.truncate
    return next((kept for kept in counts if (kept["sequence_length"], kept.get("truncate")) == settings), None)


def _sample_count(plan: Plan, manifest: DataManifest, stage: Stage) -> int | None:
    """Return the number of windows, or about that of packs; None where nobody has counted what packs keep."""
    if stage.kind == "pretrain":
        return window_count(manifest.splits["train"]["tokens"], stage.sequence_length)
    if not manifest.splits["train"]["documents"]:
        return 0
    kept = _kept(plan, manifest, stage)
    return math.ceil(kept["tokens"] / stage.sequence_length) if kept else None
