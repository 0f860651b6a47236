"""Prints the tables of `longhaul plan`: rows, columns, notes and warnings; plan_json.py gives the values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longhaul.artifacts.paths import JobId
from longhaul.data.readers.conversations import key_text
from longhaul.errors import printable
from longhaul.planning import Plan
from longhaul.report.needed_nodes_table import stage_nodes_tables
from longhaul.report.number_format import estimate, size
from longhaul.report.plan_json import Row, plan_json
from longhaul.report.serving_table import serving_table

_LISTED_NAMES = 3
STAGE_KEYS = (
    "layout",
    "pipeline_bubble",
    "kind",
    "dataset",
    "from",
    "steps",
    "estimated_epochs",
    "tokens",
    "padding_share",
    "cut_loss_share",
    "left_out_share",
    "sequence_length",
    "precision",
    "activation_checkpointing",
    "zero_stage",
    "nodes",
    "gpus_per_node",
    "gpu_hours_range",
    "gpu_hours_per_allocation",
    "minutes",
    "files_per_checkpoint",
    "checkpoint_gb",
    "asynchronous_saves",
)
"""Keys of a stage in plan.json, in the order of the table."""
_FROM_DATA = {"estimated_epochs", "padding_share", "cut_loss_share", "left_out_share"}
"""Values that are known when the data are tokenized; padding when a first attempt has packed them. Before, they have no line."""

_TITLES = {
    "estimated_epochs": "epochs of each dataset, estimated",
    "tokens": "tokens, padding included",
    "padding_share": "padding in the packs",
    "cut_loss_share": "loss tokens cut from long conversations",
    "left_out_share": "conversations left out",
    "gpu_hours_range": "GPU-hours of the training steps, estimated",
    "gpu_hours_per_allocation": "GPU-hours per allocation",
}


def print_plan(plan: Plan) -> None:
    """Print the stages, their memory, the nodes they need, the Slurm requests and the notes of a plan."""
    content = plan_json(plan)
    console = Console()
    console.print(f"run [bold]{plan.run}[/] at site [bold]{plan.site.name}[/] ({plan.site.scheduler})")
    console.print(stage_table(content["stages"]))
    if all(row["memory_per_gpu_gib"] for row in content["stages"]):
        console.print(memory_table(content["stages"]))
    for table in stage_nodes_tables(plan):
        console.print(table)
    for stage in plan.stages:
        if stage.serving:
            console.print(serving_table(stage.name, stage.serving))
    if content["datasets"]:
        console.print(files_table(content["datasets"]))
    if plan.site.scheduler == "slurm":
        console.print(request_table(content["jobs"]))
    for note in plan_notes(content):
        console.print(printable(note), markup=False)


def stage_table(stages: list[Row]) -> Table:
    """Return one column per stage with its batch, layout, steps and GPU-hours."""
    batches = [
        f"{row['global_batch_size']} = {row['micro_batch_size']} x {row['accumulation']} x {row['data_parallel']}"
        for row in stages
    ]
    lines = [["global batch = micro x accumulation x data parallel", *batches]]
    shown = [key for key in STAGE_KEYS if key not in _FROM_DATA or any(row[key] not in (None, {}) for row in stages)]
    lines += [[_title(key), *(_value(row, key) for row in stages)] for key in shown]
    return _table("Stages", ["", *(row["name"] for row in stages)], lines)


def _title(key: str) -> str:
    return _TITLES.get(key, key.replace("_", " "))


def _value(row: Row, key: str) -> str:
    if key == "gpu_hours_range":
        return estimate(row[key])
    if key == "estimated_epochs":
        return ", ".join(f"{dataset} {epochs:.2f}" for dataset, epochs in row[key].items()) or "-"
    if key in _FROM_DATA and row[key] is not None:
        return f"{row[key]:.1%}"
    if key != "steps" or row["epochs"] is None:
        return _text(row[key])
    steps = f"about {row['estimated_steps']:,}" if row["estimated_steps"] else "the job counts the samples"
    return f"{row['epochs']:g} epochs of {row['dataset']}: {steps}"


def memory_table(stages: list[Row]) -> Table:
    """Return one column per stage with the estimated parts of a GPU's memory."""
    parts = list(stages[0]["memory_per_gpu_gib"])
    lines = [[part, *(f"{row['memory_per_gpu_gib'][part]:.2f}" for row in stages)] for part in parts]
    title = "Memory per GPU, GiB (host, locked, disk, snapshot: of the node, per rank)"
    return _table(title, ["", *(row["name"] for row in stages)], lines)


def files_table(datasets: list[Row]) -> Table:
    """Return one line per dataset with its files; plan.json lists all of them."""
    header = ["dataset", "format", "files", "size", "first", "last", "left out"]
    lines = [
        [
            row["name"],
            ", ".join(row["formats"]),
            f"{row['count']:,}",
            size(row["bytes"]),
            row["files"][0],
            row["files"][-1],
            _shortened_list([Path(name).name for name in row["left_out"]]),
        ]
        for row in datasets
    ]
    return _table("Data files", header, lines)


def _shortened_list(names: list[str]) -> str:
    """Return the first names, and how many follow."""
    more = f" and {len(names) - _LISTED_NAMES:,} more" if len(names) > _LISTED_NAMES else ""
    return ", ".join(names[:_LISTED_NAMES]) + more or "-"


def request_table(jobs: list[Row]) -> Table:
    """Return one line per job with its sbatch options."""
    lines = [
        [str(JobId(row["kind"], tuple(row["names"]))), " ".join(_option(*item) for item in row["request"].items())]
        for row in jobs
    ]
    return _table("Slurm requests", ["job", "sbatch options"], lines)


def plan_notes(content: dict[str, Any]) -> list[str]:
    """Return the lines below the tables: changes of pretrained weights, warnings, and checks that need `fetch`."""
    warnings = list(content["warnings"])
    warnings += [warning for row in content["stages"] for warning in row["warnings"]]
    warnings += [line for row in content["datasets"] for line in _unread_lines(row)]
    return [
        *(f"pretrained weights: {note}" for note in content["pretrained_changes"]),
        *(f"warning: {warning}" for warning in warnings),
        *_scale_test_notes(content["scale_test"]),
        *(_hours_note(row) for row in content["stages"] if row["gpu_hours_range"]),
        *(f"not known yet: {check}" for check in content["deferred_checks"]),
    ]


def _scale_test_notes(row: Row) -> Iterator[str]:
    if counts := row["nodes"]:
        nodes = ", ".join(map(str, counts))
        yield f"scale test before stage {row['stage']}: {row['steps']} steps on {nodes} nodes; scale_test: off skips it"
    for nodes, reason in row["left_out"].items():
        yield f"scale test leaves out {nodes} node{'s' if nodes != '1' else ''}: {reason}"


def _hours_note(row: Row) -> str:
    note = f"GPU-hours of stage {row['name']}: from {'; '.join(row['gpu_hours_basis'])}"
    return (
        f"{note}. None of these was measured with {', '.join(missing)}"
        if (missing := row["gpu_hours_unmeasured"])
        else note
    )


def _unread_lines(row: Row) -> Iterator[str]:
    """Yield lines about what the first rows of a dataset contain and longhaul does not read."""
    read = f"in {row['rows_read']:,} rows, the first of {row['files_read']:,} of {row['count']:,} files"
    if columns := row["unread_columns"]:
        yield f"dataset {row['name']}: nothing reads the columns {', '.join(columns)}, found {read}"
    if keys := row["template_keys"]:
        yield (
            f"dataset {row['name']}: longhaul does not read the message keys {', '.join(map(key_text, keys))}, found {read}. "
            "Nothing of them reaches the text unless the chat template writes them. If the model must see them, use a template "
            "that writes them, or move them into content"
        )


def _option(name: str, value: str) -> str:
    return f"{name}={value}" if value else name


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(title: str, header: list[str], lines: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(*(Text(printable(cell)) for cell in line))
    return table
