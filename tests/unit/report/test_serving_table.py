"""The table of a served model shows the arithmetic behind the number of requests that fit."""

from __future__ import annotations

from longhaul.planning.serving_memory import ServingLayout, ServingMemory
from longhaul.planning.serving_plan import ServingPlan
from longhaul.report.serving_table import serving_table

GIB = 2**30
LAYOUT = ServingLayout(nodes=2, gpus_per_node=8, tensor=8, pipeline=2)


def _values(gpu_bytes: float | None) -> dict[str, str]:
    plan = ServingPlan(LAYOUT, ServingMemory(40 * GIB, GIB // 1000), 4000, 2, 60, gpu_bytes)
    names, values = (list(column.cells) for column in serving_table("chat", plan).columns)
    return dict(zip(map(str, names), map(str, values), strict=True))


def test_the_parts_add_up_to_the_memory_of_a_gpu():
    values = _values(80 * GIB)
    assert values["layout"] == "2 nodes x 8 GPUs (tensor 8 x pipeline 2)"
    assert values["KV cache of 2 x 4,000 tokens, GiB"] == "8.00"
    parts = (
        "weights on the fullest GPU",
        "left for the KV cache",
        "reserve for activations and buffers, 10%",
        "kept free, 10%",
    )
    assert sum(float(values[f"{part}, GiB"]) for part in parts) == float(values["memory of a GPU, GiB"]) == 80
    assert values["tokens that fit into the KV cache"] == "24,000"
    assert values["longest requests that fit at once"] == "6"


def test_without_a_memory_in_the_site_file_it_says_that_nothing_was_checked():
    assert "nothing was checked" in _values(None)["memory of a GPU, GiB"]
