"""Prints the settings of micro batch and recomputation from which `auto` chooses, with their memory, for `longhaul tune`."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from longhaul.errors import UserError
from longhaul.planning import Plan
from longhaul.planning.fit_memory import Setting, settings_of
from longhaul.planning.needed_nodes import USED_SHARE
from longhaul.planning.plan import StagePlan

_COLUMNS = ("recompute", "micro batch", "accumulation", "GiB per rank", "fits", "compiled", "")
_WORDS = {True: "yes", False: "no", None: "unknown"}


def print_tuning_tables(plan: Plan) -> None:
    """Print a table for each stage.

    Raises:
        UserError: the size of a Hub model is not known yet.
    """
    console = Console()
    limit_gib = plan.site.node.gpu_memory_gib
    for stage in plan.stages:
        table = Table(*_COLUMNS, title=f"Settings of stage {stage.name}", title_justify="left")
        for cells in tuning_rows(plan, stage):
            table.add_row(*cells)
        console.print(table)
    if limit_gib is None:
        console.print(
            f"Site {plan.site.name} does not state node.gpu_memory_gib, so nobody knows what fits.", markup=False
        )
    else:
        console.print(
            f"A setting fits if it needs at most {USED_SHARE:.0%} of the {limit_gib:g} GiB of a GPU. `auto` takes the least "
            "recomputation that fits, then the largest micro batch.",
            markup=False,
        )
    console.print(
        "Memory is planned, and speed is not measured. Neither key changes the weights folder: a stage continues with others.",
        markup=False,
    )


def tuning_rows(plan: Plan, stage: StagePlan) -> Iterator[list[str]]:
    """Yield the cells of each setting of a stage; the last cell marks the one of the plan."""
    if stage.sizes is None:
        raise UserError(f"stages.{stage.name}: the size of its model is not known yet", "run `longhaul fetch` first")
    has_experts = any(stage.sizes.is_sparse)
    for setting in settings_of(stage.stage, stage.sizes, plan.site, stage.world_size):
        chosen = setting.stage
        samples = chosen.global_batch_size // stage.data_parallel
        compiled = bool(plan.site.node.gpus) and chosen.compiles_layers_on_gpus(has_experts)
        yield [
            chosen.activation_checkpointing,
            str(chosen.micro_batch_size),
            str(samples // int(chosen.micro_batch_size)),
            f"{setting.needed_gib:.1f}",
            _WORDS[setting.fits],
            _WORDS[compiled],
            "this plan" if _is_of(setting, stage) else "",
        ]


def _is_of(setting: Setting, stage: StagePlan) -> bool:
    keys = ("activation_checkpointing", "micro_batch_size")
    return all(getattr(setting.stage, key) == getattr(stage.stage, key) for key in keys)
