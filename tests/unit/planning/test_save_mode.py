"""The choice of asynchronous saves, compared with numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest

from longhaul.config.communication_config import Communication, PowerSgd
from longhaul.config.partition_config import NodeShape, Partition
from longhaul.config.site_config import Site
from longhaul.config.software_config import Accelerator
from longhaul.config.stage_config import Parallel, Stage, Zero
from longhaul.planning.gpu_memory import GIB, estimate_gpu_memory
from longhaul.planning.model_state_memory import snapshot_bytes
from longhaul.planning.node_memory import PROCESS_BYTES
from longhaul.planning.save_mode import node_memory_needed, synchronous_save_reason
from tests.support.tiny_model_sizes import tiny_size, tiny_stage


def site(
    memory_mb: int,
    scheduler: Literal["local", "slurm"] = "local",
    memory: Literal["per_node", "all"] = "per_node",
    gpus: int = 4,
) -> Site:
    node = NodeShape(cpus=8, gpus=gpus, gpu_memory_gib=80, memory_mb=memory_mb)
    partition = Partition(jobs=("gpu",), max_minutes=60, node=node, memory=memory)
    accelerator = Accelerator(cuda="13.0" if gpus else None)
    return Site(name="here", scheduler=scheduler, partitions=(partition,), accelerator=accelerator)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"zero": Zero(stage=0), "precision": "fp32"}, 8 * 1000 + 4 * 1000),
        ({"zero": Zero(stage=1)}, 12 * 250 + 2 * 1000),
        ({"zero": Zero(stage=2), "precision": "fp32"}, 12 * 250 + 4 * 1000),
        ({"zero": Zero(stage=3)}, 12 * 250),
        ({"zero": Zero(stage=2, offload_optimizer="cpu")}, 12 * 250 + 2 * 1000),
        ({"zero": Zero(stage=3, offload_optimizer="nvme")}, 0),
        ({"communication": Communication(powersgd=PowerSgd())}, 12 * 250 + 2 * 1000 + 4 * 1000),
    ],
)
def test_a_snapshot_holds_optimizer_states_and_the_saved_weights(changes: dict[str, Any], expected: int):
    assert snapshot_bytes(tiny_stage(**changes), parameters=1000, partition=250) == expected


PARTITION = 12 * 1352 // 4
NODES: dict[str, tuple[dict[str, Any], int]] = {
    "one rank saves the weights": ({}, 4 * PARTITION + 2 * 1352),
    "ZeRO 0: one rank saves all": ({"zero": Zero(stage=0), "precision": "fp32"}, 12 * 1352),
    "ZeRO 3: no rank saves weights": ({"zero": Zero(stage=3)}, 4 * PARTITION),
}


@pytest.mark.parametrize(("changes", "snapshots"), NODES.values(), ids=NODES)
def test_a_node_holds_the_snapshots_of_its_ranks(changes: dict[str, Any], snapshots: int):
    stage = tiny_stage(gpus_per_node=4, **changes)
    memory = estimate_gpu_memory(stage, tiny_size(), 4)
    assert node_memory_needed(stage, memory, site(1000)) == 4 * PROCESS_BYTES + snapshots


def test_each_tensor_rank_saves_its_weights():
    stage = tiny_stage(gpus_per_node=4, parallel=Parallel(tensor=2))
    memory = estimate_gpu_memory(stage, tiny_size(), 4)
    needed = node_memory_needed(stage, memory, site(1000)) - 4 * PROCESS_BYTES
    assert needed == 2 * memory.snapshot + 2 * (memory.snapshot - memory.weights)


def test_on_cpus_the_training_itself_is_in_the_same_memory():
    stage = tiny_stage(gpus_per_node=1)
    memory = estimate_gpu_memory(stage, tiny_size(), 1)
    on_cpus = site(1000, gpus=0)
    assert node_memory_needed(stage, memory, on_cpus) - node_memory_needed(stage, memory, site(1000)) == (
        memory.model_states + memory.activations + memory.logits
    )


def reason(stage: Stage, site: Site, snapshot: int) -> str | None:
    memory = replace(estimate_gpu_memory(stage, tiny_size(), 4), snapshot=snapshot)
    return synchronous_save_reason(stage, memory, site)


def test_a_save_is_synchronous_where_its_copy_does_not_fit():
    stage = tiny_stage(zero=Zero(stage=3), gpus_per_node=4)
    assert reason(stage, site(8 * 1024), GIB) is None
    text = reason(stage, site(8 * 1024), GIB + 1)
    assert (
        text
        and "stages.base: each save stops the training" in text
        and "need 8.1 GiB" in text
        and "gets 8.0 GiB" in text
    )


def test_a_job_has_its_share_of_the_node():
    stage = tiny_stage(zero=Zero(stage=3), gpus_per_node=2)
    half = site(8 * 1024, scheduler="slurm", memory="per_node")
    assert reason(stage, half, GIB) is None and reason(stage, half, GIB + 1)
    assert reason(stage, site(8 * 1024, scheduler="slurm", memory="all"), 3 * GIB) is None


def test_states_on_a_disk_are_saved_synchronously():
    stage = tiny_stage(zero=Zero(stage=3, offload_optimizer="nvme"))
    assert "optimizer states are on a disk" in (reason(stage, site(10**6), 0) or "")


def test_before_fetch_has_read_the_size_saves_count_as_asynchronous():
    assert synchronous_save_reason(tiny_stage(), None, site(1)) is None
