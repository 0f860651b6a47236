"""Prints how many nodes a model needs: a table for each stage of a plan, and one of well-known models at a site."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from longhaul.config.model_size import model_size
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Stage
from longhaul.config.well_known_models import REFERENCE_MODELS
from longhaul.planning import Plan, model_config
from longhaul.planning.gpu_memory import GIB
from longhaul.planning.needed_nodes import WAYS, Fit, example_stage, smallest_fits
from longhaul.report.plan_json import DATA_PARALLEL, layout_text


def stage_nodes_tables(plan: Plan) -> list[Table]:
    """Return one table per stage: the smallest number of nodes by way to hold the model.

    There is none where the model or the memory of a GPU is not known.
    """
    model = model_config(plan.loaded, plan.lock)
    if model is None or not plan.site.node.gpus or plan.site.node.gpu_memory_gib is None:
        return []
    return [_stage_table(stage.stage, model, plan.site) for stage in plan.stages]


def _stage_table(stage: Stage, model: dict[str, Any], site: Site) -> Table:
    title = f"How many nodes does stage {stage.name} need? (activation_checkpointing full)"
    table = Table(title=title, title_justify="left")
    for column in ("way to hold the model", "nodes", "micro batch", "GPU GiB", "CPU GiB"):
        table.add_column(column, overflow="fold")
    for way, fit in smallest_fits(stage, model, site).items():
        table.add_row(*_cells(way, fit, site.partition_for("gpu").max_nodes))
    return table


def _cells(way: str, fit: Fit | None, max_nodes: int) -> list[str]:
    if fit is None:
        return [way, f"> {max_nodes}", "-", "-", "-"]
    layout = layout_text(fit.stage.parallel)
    way = way if layout == DATA_PARALLEL else f"{way}: {layout}"
    micro_batch, memory = str(fit.stage.micro_batch_size), f"{fit.memory.total / GIB:.0f}"
    return [way, str(fit.nodes), micro_batch, memory, f"{fit.host_gib:.0f}"]


def reference_nodes_text(site: Site, sequence_length: int) -> str:
    """Return a Markdown table: for each well-known model, the smallest number of nodes of the site by way to hold it."""
    header = ["model", "parameters", *WAYS]
    lines = [header, ["---"] * len(header)]
    for name, model in REFERENCE_MODELS.items():
        fits = smallest_fits(example_stage(sequence_length), model, site)
        parameters = f"{model_size(model).total / 1e9:.1f} B"
        lines.append([name, parameters, *(_nodes_and_layout(fit) for fit in fits.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _nodes_and_layout(fit: Fit | None) -> str:
    if fit is None:
        return "-"
    layout = layout_text(fit.stage.parallel)
    return str(fit.nodes) if layout == DATA_PARALLEL else f"{fit.nodes} ({layout})"
