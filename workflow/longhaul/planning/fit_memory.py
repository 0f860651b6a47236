"""Chooses micro_batch_size and activation_checkpointing where they are `auto`, from the memory plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from longhaul.config.field_types import AUTO_MICRO_BATCH
from longhaul.config.model_size import ModelSize
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError
from longhaul.planning.check_parallel_layout import MAX_PIPELINE_BUBBLE, data_parallel_size, pipeline_bubble
from longhaul.planning.gpu_memory import GIB, available_gib, estimate_gpu_memory, needed_gib
from longhaul.planning.memory_remedies import fitting_settings
from longhaul.planning.needed_nodes import USED_SHARE

_MOST_SAMPLES = 1024
"""Larger micro batches are not tried: no GPU gets faster by them."""
_Recomputed = Literal["none", "selective", "full"]
_LEAST_FIRST: tuple[_Recomputed, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Setting:
    """A stage with a micro batch and a kind of recomputation, and the memory that it needs of a GPU.

    fits: whether that is within USED_SHARE of the GPU's memory; None if the site file does not state it
    """

    stage: Stage
    needed_gib: float
    fits: bool | None


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
    settings = (_setting(choice, sizes, site, world_size) for choice in choices)
    for setting in settings:
        if setting.fits:
            return setting.stage
    smallest, usable = _setting(choices[-1], sizes, site, world_size), USED_SHARE * limit_gib * GIB
    raise UserError(
        f"{where}: micro_batch_size {smallest.stage.micro_batch_size} with activation_checkpointing "
        f"{smallest.stage.activation_checkpointing} needs {needed_gib(smallest.needed_gib * GIB)} GiB per GPU; "
        f"{USED_SHARE:.0%} of the {limit_gib:g} GiB of site {site.name} are {available_gib(usable)} GiB",
        fitting_settings(smallest.stage, sizes, site, lambda memory: memory.total <= usable)
        + _shorter_sequence(smallest.stage, sizes, site, world_size),
    )


def _shorter_sequence(stage: Stage, sizes: ModelSize, site: Site, world_size: int) -> str:
    """Return the end of the remedy: half of the sequence length, or a half of that, with which the stage fits; else nothing."""
    length = stage.sequence_length
    while length % (2 * stage.parallel.sequence) == 0:
        length //= 2
        if _setting(stage.model_copy(update={"sequence_length": length}), sizes, site, world_size).fits:
            return f", or shorten sequence_length to {length}"
    return ""


def settings_of(stage: Stage, sizes: ModelSize, site: Site, world_size: int) -> list[Setting]:
    """Return the settings of a stage from which `auto` chooses: less recomputation first, then smaller micro batches.

    Of the micro batches of one kind of recomputation that do not fit, only the smallest is returned.
    """
    both = stage.model_copy(update={"micro_batch_size": AUTO_MICRO_BATCH, "activation_checkpointing": "auto"})
    found = list[Setting]()
    for choice in reversed(list(_choices(both, data_parallel_size(stage, world_size)))):
        setting = _setting(choice, sizes, site, world_size)
        kinds_too_large = {other.stage.activation_checkpointing for other in found if other.fits is False}
        if setting.fits is not False or choice.activation_checkpointing not in kinds_too_large:
            found.append(setting)
    return sorted(found, key=lambda setting: _LEAST_FIRST.index(setting.stage.activation_checkpointing))  # pyright: ignore


def _setting(stage: Stage, sizes: ModelSize, site: Site, world_size: int) -> Setting:
    needed_gib = estimate_gpu_memory(stage, sizes, world_size, bool(site.node.gpus)).total / GIB
    limit_gib = site.node.gpu_memory_gib
    return Setting(stage, needed_gib, None if limit_gib is None else needed_gib <= USED_SHARE * limit_gib)


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
