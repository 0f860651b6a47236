"""Chooses micro_batch_size and activation_checkpointing where they are `auto`, from the memory plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from longhaul.config.field_types import AUTO_MICRO_BATCH
from longhaul.config.model_size import ModelSize
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError
from longhaul.planning.check_parallel_layout import MAX_PIPELINE_BUBBLE, data_parallel_size, pipeline_bubble
from longhaul.planning.gpu_memory import GIB, estimate_gpu_memory
from longhaul.planning.memory_remedies import fitting_settings
from longhaul.planning.needed_nodes import USED_SHARE

_MOST_SAMPLES = 1024
"""Larger micro batches are not tried: no GPU gets faster by them."""
_Recomputed = Literal["none", "selective", "full"]
_LEAST_FIRST: tuple[_Recomputed, ...] = ("none", "selective", "full")


def fit_memory(stage: Stage, sizes: ModelSize | None, site: Site, world_size: int) -> Stage:
    """Return the stage with numbers in place of `auto`; the same config, site and model give the same ones.

    The least recomputation with which a micro batch fits, and then the largest micro batch. Until fetch has read the size of a
    Hub model, they are the smallest ones.

    Raises:
        UserError: nothing fits, or the site file does not state the memory of a GPU.
    """
    if stage.micro_batch_size != AUTO_MICRO_BATCH and stage.activation_checkpointing != "auto":
        return stage
    choices = list(_choices(stage, data_parallel_size(stage, world_size)))
    if sizes is None:
        return choices[-1]
    limit_gib, where = site.node.gpu_memory_gib, f"stages.{stage.name}"
    if limit_gib is None:
        raise UserError(
            f"{where}: auto needs the memory of a GPU, and site {site.name} does not state it",
            "set node.gpu_memory_gib of the partition, or write micro_batch_size and activation_checkpointing as values",
        )
    needed_gib = 0.0
    for choice in choices:
        needed_gib = estimate_gpu_memory(choice, sizes, world_size).total / GIB
        if needed_gib <= USED_SHARE * limit_gib:
            return choice
    smallest = choices[-1]
    raise UserError(
        f"{where}: micro_batch_size {smallest.micro_batch_size} with activation_checkpointing "
        f"{smallest.activation_checkpointing} needs {needed_gib:.1f} GiB per GPU; {USED_SHARE:.0%} of the "
        f"{limit_gib:g} GiB of site {site.name} are {USED_SHARE * limit_gib:.1f} GiB",
        fitting_settings(smallest, sizes, site, lambda memory: memory.total <= USED_SHARE * limit_gib * GIB)
        + ", or shorten sequence_length",
    )


def _choices(stage: Stage, data_parallel: int) -> Iterator[Stage]:
    """Yield the stage with each allowed pair of settings: less recomputation first, then larger micro batches."""
    kinds = _LEAST_FIRST if stage.activation_checkpointing == "auto" else (stage.activation_checkpointing,)
    for kind in kinds:
        for micro in _micro_batches(stage, data_parallel):
            yield stage.model_copy(update={"activation_checkpointing": kind, "micro_batch_size": micro})


def _micro_batches(stage: Stage, data_parallel: int) -> Sequence[int]:
    """Return the micro batches that divide the global batch, largest first. A pipeline needs many of them to be busy."""
    if stage.micro_batch_size != AUTO_MICRO_BATCH:
        return [stage.micro_batch_size]
    samples = stage.global_batch_size // data_parallel
    divisors = [micro for micro in range(min(samples, _MOST_SAMPLES), 0, -1) if samples % micro == 0]
    busy = [micro for micro in divisors if _is_busy(stage, samples // micro)]
    return busy or [1]


def _is_busy(stage: Stage, micro_batches: int) -> bool:
    return pipeline_bubble(stage.parallel.pipeline, micro_batches) <= MAX_PIPELINE_BUBBLE
