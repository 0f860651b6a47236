"""The CPU memory that a training needs on a node, compared with numbers computed by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from longhaul.config.stage_config import Zero
from longhaul.planning.gpu_memory import estimate_gpu_memory, needed_gib
from longhaul.planning.node_memory import PROCESS_BYTES, job_bytes, training_bytes
from tests.support.small_configs import plan_of
from tests.support.tiny_model_sizes import tiny_size, tiny_stage
from tests.unit.planning.test_save_mode import site

OFFLOADED = {
    "model.llama.hidden_size": 1024,
    "model.llama.num_hidden_layers": 200,
    "stages.0.gpus_per_node": 8,
    "stages.0.zero": {"stage": 3, "offload_optimizer": "cpu"},
    "stages.0.precision": "bf16",
    "stages.0.global_batch_size": 128,
}
WARNS = "of CPU memory per node; its job gets"
ON_CPUS = {"stages.0.gpus_per_node": 4, "stages.0.micro_batch_size": 16, "stages.0.global_batch_size": 64}


def node_warning(folder: Path, stage: dict[str, Any], site: dict[str, Any]) -> str | None:
    """Return the warning of a stage about the memory of a node, with 8 cores and without GPUs."""
    node = {"accelerator": "cpu", "partitions.0.node": {"cpus": 8, **site.pop("node")}}
    warnings = plan_of(folder, {**ON_CPUS, **stage}, {**node, **site}).stages[0].warnings
    return next((text for text in warnings if WARNS in text), None)


def needed_mb(folder: Path, stage: dict[str, Any]) -> float:
    """Return the MiB that the ranks of a node with CPUs alone need."""
    site = {"accelerator": "cpu", "partitions.0.node": {"cpus": 8, "memory_mb": 10**6}}
    plan = plan_of(folder, {**ON_CPUS, **stage}, site)
    planned = plan.stages[0]
    assert planned.memory
    return training_bytes(planned.stage, planned.memory, plan.site) / 2**20


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
    (warning,) = (text for text in warnings if WARNS in text)
    assert f"needs about {needed_gib(needed)} GiB" in warning and "Use 2 nodes, or offload less or to a disk" in warning
    repaired = plan_of(tmp_path, {**OFFLOADED, "stages.0.nodes": 2}, low).stages[0].warnings
    assert not any("the kernel will probably end it" in text for text in repaired)


def test_the_warning_shows_more_than_the_limit_also_one_mib_below_it(tmp_path: Path):
    """Both numbers were rounded to the same one."""
    needed = needed_mb(tmp_path, {})
    node = {"memory_mb": math.ceil(needed) - 1}
    warning = node_warning(tmp_path, {}, {"node": node, "partitions.0.memory": "all"})
    assert warning
    shown = [float(number) for number in re.findall(r"([0-9.]+) GiB", warning)]
    assert shown[0] > shown[1] and "(node.memory_mb)" in warning


def test_on_cpus_a_smaller_micro_batch_or_the_whole_node_is_enough_and_nothing_about_offload(tmp_path: Path):
    """Four of eight cores get half of the memory."""
    needed = needed_mb(tmp_path, {})
    site = {"node": {"memory_mb": int(2 * needed) - 20}}
    warning = node_warning(tmp_path, {}, dict(site))
    assert warning and "the part of node.memory_mb for 4 of 8 cores" in warning
    assert "Set micro_batch_size to 8, or " in warning and "offload" not in warning
    assert warning.endswith("or set memory of the partition to all in the site file")
    assert node_warning(tmp_path, {"stages.0.micro_batch_size": 8}, dict(site)) is None
    assert node_warning(tmp_path, {}, {**site, "partitions.0.memory": "all"}) is None


def test_processes_that_need_more_than_all_nodes_have_get_a_remedy(tmp_path: Path):
    warning = node_warning(tmp_path, {}, {"node": {"memory_mb": 1000}})
    assert warning and warning.endswith("Use nodes with more memory, or a smaller model")
