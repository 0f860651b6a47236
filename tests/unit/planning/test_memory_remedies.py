"""Settings with less memory of a GPU: what a remedy names is allowed, and is enough."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from longhaul.config.site_config import Site
from longhaul.planning.gpu_memory import GIB, estimate_gpu_memory, needed_gib
from longhaul.planning.memory_remedies import fitting_settings, smaller_settings
from tests.support.small_configs import SITE, changed, plan_of
from tests.support.tiny_model_sizes import tiny_size, tiny_stage


def remedy(limit: float, nodes: int = 2, **keys: Any) -> str:
    """Return the remedy where a GPU holds `limit` of the model states that TINY_LLAMA has under these keys."""
    site = Site.model_validate_json(json.dumps(changed(SITE, {"partitions.0.max_nodes": nodes})))
    stage, sizes = tiny_stage(micro_batch_size=1, global_batch_size=16, **keys), tiny_size()
    states = estimate_gpu_memory(stage, sizes, stage.nodes * stage.gpus_per_node).model_states
    return fitting_settings(stage, sizes, site, lambda memory: memory.model_states <= limit * states)


def test_the_first_settings_that_are_enough_are_named():
    """bf16 under ZeRO 1 on one rank: 2 bytes of weights, 2 of gradients and 12 of states for each parameter."""
    assert remedy(0.5) == "set zero.offload_optimizer to cpu or use 2 GPUs with zero.stage 3"
    assert remedy(0.1) == (
        "set zero.stage to 3, zero.offload_optimizer to cpu and zero.offload_param to cpu or use 16 GPUs with zero.stage 3"
    )


SMALL_BUCKET = {"stage": 1, "reduce_bucket_size": 10**6}
"""DeepSpeed's default would take more memory than this model."""
LARGE_BATCH = {
    "model.llama.hidden_size": 1024,
    "model.llama.num_hidden_layers": 8,
    "stages.0.sequence_length": 128,
    "stages.0.global_batch_size": 64,
    "stages.0.micro_batch_size": 64,
    "stages.0.zero": SMALL_BUCKET,
}


@pytest.mark.parametrize(
    ("share", "says", "changes"),
    [
        (0.9, "Set micro_batch_size to 32", {"stages.0.micro_batch_size": 32}),
        (0.9, " or set zero.offload_optimizer to cpu", {"stages.0.zero": {**SMALL_BUCKET, "offload_optimizer": "cpu"}}),
        (
            0.22,
            "Set micro_batch_size to 1, activation_checkpointing to full and zero.offload_optimizer to cpu",
            {
                "stages.0.micro_batch_size": 1,
                "stages.0.activation_checkpointing": "full",
                "stages.0.zero": {**SMALL_BUCKET, "offload_optimizer": "cpu"},
            },
        ),
    ],
)
def test_the_plan_warns_of_activations_that_do_not_fit_and_names_what_is_enough(
    tmp_path: Path, share: float, says: str, changes: dict[str, Any]
):
    memory = plan_of(tmp_path, LARGE_BATCH).stages[0].memory
    assert memory and memory.model_states < 0.21 * memory.total
    limit = share * memory.total / GIB
    site = {"partitions.0.node.gpu_memory_gib": limit}
    (warning,) = plan_of(tmp_path, LARGE_BATCH, site).stages[0].warnings
    assert f"needs about {needed_gib(memory.total)} GiB per GPU; site centre has {limit:g} GiB" in warning
    assert says in warning
    assert plan_of(tmp_path, {**LARGE_BATCH, **changes}, site).stages[0].warnings == ()


def test_a_stage_that_fits_gives_no_warning(tmp_path: Path):
    memory = plan_of(tmp_path, LARGE_BATCH).stages[0].memory
    assert memory
    site = {"partitions.0.node.gpu_memory_gib": 1.0001 * memory.total / GIB}
    assert plan_of(tmp_path, LARGE_BATCH, site).stages[0].warnings == ()


def test_a_huge_micro_batch_is_warned_of_at_once(tmp_path: Path):
    """2^30 has few divisors, and a search through all smaller numbers would take minutes."""
    huge = {**LARGE_BATCH, "stages.0.global_batch_size": 2**30, "stages.0.micro_batch_size": 2**30}
    began_s = time.monotonic()
    (warning,) = plan_of(tmp_path, huge, {"partitions.0.node.gpu_memory_gib": 80}).stages[0].warnings
    assert "Set micro_batch_size to" in warning and time.monotonic() - began_s < 10


def test_more_gpus_than_the_site_has_are_not_named():
    assert remedy(0.1, nodes=1).endswith("zero.offload_param to cpu")


def test_a_pipeline_gets_no_higher_zero_stage():
    """Pipelines work with ZeRO 0 and 1 alone."""
    keys = {"parallel": {"pipeline": 2}, "gpus_per_node": 2}
    assert remedy(0.5, **keys) == "set zero.offload_optimizer to cpu or use 8 GPUs"
    assert remedy(0.01, **keys) == "use a smaller model, or GPUs with more memory"


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        ({"micro_batch_size": 12}, "set micro_batch_size to 6 or set activation_checkpointing to selective"),
        ({"micro_batch_size": 9, "activation_checkpointing": "full"}, "set micro_batch_size to 3"),
        ({"micro_batch_size": 1, "activation_checkpointing": "selective"}, "set activation_checkpointing to full"),
        ({"micro_batch_size": 1, "activation_checkpointing": "full"}, "set zero.stage to 2 or set zero.stage to 3"),
        (
            {
                "micro_batch_size": 1,
                "activation_checkpointing": "full",
                "zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
            },
            "use more GPUs, or shorten sequence_length",
        ),
    ],
    ids=str,
)
def test_out_of_memory_names_the_next_smaller_settings(keys: dict[str, Any], remedy: str):
    assert smaller_settings(tiny_stage(**keys)) == remedy
