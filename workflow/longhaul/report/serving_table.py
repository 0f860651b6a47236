"""The table of a server's memory: weights, KV cache and reserve of the fullest GPU, and how many requests fit."""

from __future__ import annotations

from rich.table import Table

from longhaul.planning.gpu_memory import GIB
from longhaul.planning.serving_memory import RESERVED_SHARE, USED_SHARE, usable_bytes
from longhaul.planning.serving_plan import ServingPlan
from longhaul.report.number_format import MISSING, exact, size


def serving_table(stage: str, plan: ServingPlan) -> Table:
    """Return one line per quantity of the plan of a stage's server."""
    table = Table("", stage, title="Served model", title_justify="left")
    for name, value in serving_lines(plan):
        table.add_row(name, value)
    return table


def serving_lines(plan: ServingPlan) -> list[tuple[str, str]]:
    """Return (name, value) of each quantity."""
    memory, tokens = plan.memory, plan.kv_cache_tokens
    required = plan.context * plan.concurrency
    lines = [
        ("layout", str(plan.layout)),
        ("longest request, tokens", exact(plan.context)),
        ("weights on the fullest GPU, GiB", _gib(memory.weights)),
        ("KV cache of one token", size(memory.token)),
        (f"KV cache of {plan.concurrency} x {exact(plan.context)} tokens, GiB", _gib(memory.token * required)),
    ]
    if plan.gpu_bytes is None or tokens is None:
        return [
            *lines,
            ("memory of a GPU, GiB", f"{MISSING} (the site file has no gpu_memory_gib: nothing was checked)"),
        ]
    return [
        *lines,
        (f"reserve for activations and buffers, {RESERVED_SHARE:.0%}, GiB", _gib(RESERVED_SHARE * plan.gpu_bytes)),
        (f"kept free, {1 - USED_SHARE:.0%}, GiB", _gib((1 - USED_SHARE) * plan.gpu_bytes)),
        ("memory of a GPU, GiB", _gib(plan.gpu_bytes)),
        ("left for the KV cache, GiB", _gib(usable_bytes(plan.gpu_bytes) - memory.weights)),
        ("tokens that fit into the KV cache", exact(tokens)),
        ("longest requests that fit at once", exact(tokens // plan.context)),
    ]


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"
