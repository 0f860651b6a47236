"""The CPU memory that a training needs on a node, compared with numbers computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.config.stage_config import Zero
from longhaul.planning.gpu_memory import GIB, estimate_gpu_memory
from longhaul.planning.node_memory import PROCESS_BYTES, job_bytes, training_bytes
from tests.support.small_configs import plan_of
from tests.support.tiny_sizes import tiny_size, tiny_stage
from tests.unit.planning.test_save_mode import site

OFFLOADED = {
    "model.llama.hidden_size": 1024,
    "model.llama.num_hidden_layers": 200,
    "stages.0.gpus_per_node": 8,
    "stages.0.zero": {"stage": 3, "offload_optimizer": "cpu"},
    "stages.0.precision": "bf16",
    "stages.0.global_batch_size": 128,
}


def test_ranks_need_their_processes_and_what_is_offloaded():
    stage = tiny_stage(gpus_per_node=4, zero=Zero(stage=3, offload_optimizer="cpu"))
    memory = estimate_gpu_memory(stage, tiny_size(), 4)
    assert memory.host > 0
    assert training_bytes(stage, memory, site(1000)) == 4 * (PROCESS_BYTES + memory.host)


@pytest.mark.parametrize(
    ("scheduler", "memory", "expected"),
    [("slurm", "per_node", 500), ("slurm", "all", 1000), ("local", "per_node", 1000)],
)
def test_a_job_gets_its_share_of_a_node(scheduler: str, memory: str, expected: int):
    """Two of four GPUs get half of the memory, unless the partition gives all of it."""
    found = site(1000, scheduler, memory)  # type: ignore[arg-type]
    assert job_bytes(tiny_stage(gpus_per_node=2), found) == expected * 2**20


def test_the_plan_warns_of_offload_beyond_the_nodes_memory_and_names_the_nodes(tmp_path: Path):
    planned = plan_of(tmp_path, OFFLOADED).stages[0]
    assert planned.memory
    needed = 8 * (PROCESS_BYTES + planned.memory.host)
    low = {"partitions.0.node.memory_mb": int(0.75 * needed) // 2**20}
    warnings = plan_of(tmp_path, OFFLOADED, low).stages[0].warnings
    (warning,) = (text for text in warnings if "of CPU memory per node; its job has" in text)
    assert f"needs about {needed / GIB:.1f} GiB" in warning and "Use 2 nodes, or offload less or to a disk" in warning
    repaired = plan_of(tmp_path, {**OFFLOADED, "stages.0.nodes": 2}, low).stages[0].warnings
    assert not any("the kernel will probably end it" in text for text in repaired)
