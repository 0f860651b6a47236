"""Estimates one checkpoint: bytes, number of files, seconds to write."""

from __future__ import annotations

from longhaul.artifacts.reference_files import REFERENCE_FILES
from longhaul.config.model_size import ModelSize
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Parallel, Stage
from longhaul.planning.constants_shared_with_trainer import COMPUTE_BYTES


def checkpoint_bytes(stage: Stage, sizes: ModelSize) -> int:
    """Return the bytes of one checkpoint: fp32 master weights, two moments, and the weights in compute precision."""
    return (12 + COMPUTE_BYTES[stage.precision]) * sizes.total


def checkpoint_write_s(save_bytes: int, site: Site) -> float:
    """Return the seconds to write one checkpoint; 0 if the site's write rate is not known."""
    return save_bytes / (site.checkpoint_write_gb_per_s * 1e9) if site.checkpoint_write_gb_per_s else 0.0


def files_per_checkpoint(stage: Stage, world_size: int, is_tied: bool) -> int:
    """Return the number of files in the last checkpoint of a stage, which is the largest: it has reference values.

    These are DeepSpeed's files with model and optimizer states, one trainer state per rank, state.json, manifest.json and the
    reference values. A pipeline writes one layer file per pipeline rank, and one each for embedding and head. A model that is
    split over ranks also has a file with its layout, and one with buffers per pipeline rank.

    is_tied: the head is the embedding, and has no file of its own
    """
    parallel = stage.parallel
    model = world_size if stage.zero.stage == 3 else parallel.tensor * parallel.pipeline
    optimizer = world_size if stage.zero.stage >= 1 else 0
    layers = 0
    if parallel.pipeline > 1 and parallel.expert == 1:
        layers = (parallel.pipeline + (1 if is_tied else 2)) * parallel.tensor
    is_split = parallel.model_copy(update={"sequence": 1}) != Parallel()
    split = 1 + parallel.pipeline if is_split else 0
    return model + layers + optimizer + split + world_size + 2 + len(REFERENCE_FILES)
