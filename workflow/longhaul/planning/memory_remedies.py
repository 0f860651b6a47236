"""Names settings that need less memory: for a stage that does not fit, those with which it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

from longhaul.config.model_size import ModelSize
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError
from longhaul.planning.check_parallel_layout import data_parallel_size
from longhaul.planning.gpu_memory import MemoryEstimate, estimate_gpu_memory

_LARGEST_ZERO_STAGE = 3
_MOST_DIVISOR = 100_000
_RECOMPUTED: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
Fits = Callable[[MemoryEstimate], bool]


def fitting_settings(stage: Stage, sizes: ModelSize, site: Site, fits: Fits) -> str:
    """Return the remedy for a stage that needs too much GPU memory. Each alternative is enough: settings of the micro batch, of
    `zero`, or a number of GPUs.

    fits: whether a memory estimate is small enough
    """
    ranks = stage.nodes * stage.gpus_per_node

    def first(settings: Iterator[tuple[dict[str, Any], Stage]]) -> str | None:
        found = (settings_text(keys) for keys, other in settings if fits(estimate_gpu_memory(other, sizes, ranks)))
        return next(found, None)

    single = (
        first(micro_batch_settings(stage)),
        first(_zero_settings(stage)),
        _fitting_gpus(stage, sizes, site, fits),
    )
    remedies = [text for text in single if text] or [first(_combined_settings(stage))]
    return " or ".join(filter(None, remedies)) or "use a smaller model, or GPUs with more memory"


def smaller_settings(stage: Stage) -> str:
    """Return the remedy for a stage that ran out of GPU memory: a smaller micro batch, more recomputation, or less on the GPU."""
    micro, remedies = stage.micro_batch_size, list[str]()
    if isinstance(micro, int) and micro > 1:
        remedies.append(f"set micro_batch_size to {_smaller_divisors(micro)[0]}")
    if stage.activation_checkpointing in _RECOMPUTED[:-1]:
        more = _RECOMPUTED[_RECOMPUTED.index(stage.activation_checkpointing) + 1]
        remedies.append(f"set activation_checkpointing to {more}")
    if not remedies:
        remedies = [settings_text(keys) for keys, _ in _zero_settings(stage)][:2]
    return " or ".join(remedies) or "use more GPUs, or shorten sequence_length"


def micro_batch_settings(stage: Stage) -> Iterator[tuple[dict[str, Any], Stage]]:
    """Yield smaller micro batches, largest first, then more recomputation, then both; each with the stage that has them."""
    micro, kind = int(stage.micro_batch_size), stage.activation_checkpointing
    smaller = [{"micro_batch_size": number} for number in _smaller_divisors(micro)]
    more = [
        {"activation_checkpointing": other}
        for other in _RECOMPUTED[1:]
        if kind in _RECOMPUTED[: _RECOMPUTED.index(other)]
    ]
    both = [{**less, **recomputed} for recomputed in more for less in smaller]
    for changes in (*smaller, *more, *both):
        yield changes, stage.model_copy(update=changes)


def _smaller_divisors(number: int) -> list[int]:
    """Return the divisors of a number without itself, largest first; of a huge number only the smallest and the largest ones."""
    small = [divisor for divisor in range(1, min(math.isqrt(number), _MOST_DIVISOR) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)} - {number}, reverse=True)


def _combined_settings(stage: Stage) -> Iterator[tuple[dict[str, Any], Stage]]:
    """Yield the smallest micro batch with full recomputation, together with each change of `zero`."""
    *_, (batch, smallest) = [(dict[str, Any](), stage), *micro_batch_settings(stage)]
    for keys, found in _zero_settings(smallest):
        yield {**batch, **keys}, found


def _zero_settings(stage: Stage) -> Iterator[tuple[dict[str, Any], Stage]]:
    """Yield the changes of `zero` that leave less on the GPU and that the layout allows, with the stage that has them."""
    zero, ranks = stage.zero, stage.nodes * stage.gpus_per_node
    changes: list[dict[str, Any]] = [{"stage": number} for number in range(zero.stage + 1, _LARGEST_ZERO_STAGE + 1)]
    if zero.offload_optimizer == "none":
        changes += [{"stage": number, "offload_optimizer": "cpu"} for number in range(max(1, zero.stage), 4)]
    if zero.offload_param == "none":
        optimizer = "cpu" if zero.offload_optimizer == "none" else zero.offload_optimizer
        changes.append({"stage": _LARGEST_ZERO_STAGE, "offload_optimizer": optimizer, "offload_param": "cpu"})
    for keys in changes:
        changed = {key: value for key, value in keys.items() if value != getattr(zero, key)}
        found = _with_zero(stage, changed)
        if changed and is_allowed(found, ranks):
            yield {f"zero.{key}": value for key, value in changed.items()}, found


def _fitting_gpus(stage: Stage, sizes: ModelSize, site: Site, fits: Fits) -> str | None:
    """Return the first number of GPUs, doubled each time, with which a stage fits as it is or with ZeRO 3."""
    partition = site.partition_for("gpu")
    most = partition.max_nodes * partition.node.gpus
    ranks = 2 * stage.nodes * stage.gpus_per_node
    while ranks <= most:
        for text, found in (("", stage), (" with zero.stage 3", _with_zero(stage, {"stage": _LARGEST_ZERO_STAGE}))):
            if is_allowed(found, ranks) and fits(estimate_gpu_memory(found, sizes, ranks)):
                return f"use {ranks} GPUs{text}"
        ranks *= 2
    return None


def _with_zero(stage: Stage, changes: dict[str, Any]) -> Stage:
    return stage.model_copy(update={"zero": stage.zero.model_copy(update=changes)})


def is_allowed(stage: Stage, ranks: int) -> bool:
    """Return whether a layout is supported on this number of ranks, and the global batch can be divided."""
    try:
        samples_per_pass = data_parallel_size(stage, ranks) * int(stage.micro_batch_size)
    except UserError:
        return False
    return stage.global_batch_size % samples_per_pass == 0


def settings_text(changes: dict[str, Any]) -> str:
    """Return the words of a remedy for changed keys: set a to 1 and b to 2."""
    *others, last = [f"{key} to {value}" for key, value in changes.items()]
    return f"set {', '.join(others)} and {last}" if others else f"set {last}"
