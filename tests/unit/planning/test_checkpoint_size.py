"""Bytes, files and write time of a checkpoint, compared with numbers computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from longhaul.config.partition_config import NodeShape, Partition
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Parallel, Zero
from longhaul.planning.checkpoint_size import checkpoint_bytes, checkpoint_write_s, files_per_checkpoint
from tests.support.tiny_model_sizes import tiny_size, tiny_stage


@pytest.mark.parametrize(("precision", "expected"), [("bf16", 14 * 1352), ("fp32", 16 * 1352)])
def test_checkpoint_has_master_weights_two_moments_and_weights(precision: str, expected: int):
    assert checkpoint_bytes(tiny_stage(precision=precision), tiny_size()) == expected


# changes of the stage, files: model + optimizer + trainer states, state.json, manifest.json (4 ranks); no reference values
FILES: dict[str, tuple[dict[str, Any], int]] = {
    "ZeRO 0": ({"zero": Zero(stage=0)}, 1 + 0 + 4 + 2),
    "ZeRO 1": ({}, 1 + 4 + 4 + 2),
    "ZeRO 3": ({"zero": Zero(stage=3)}, 4 + 4 + 4 + 2),
    "sequence parallelism": ({"parallel": Parallel(sequence=2)}, 1 + 4 + 4 + 2),
    "tensor parallelism: layout and buffers": ({"parallel": Parallel(tensor=2)}, 2 + 4 + 4 + 2 + 2),
    "pipeline: layer files, layout and buffers": ({"parallel": Parallel(pipeline=2)}, 2 + 4 + 4 + 2 + 4 + 3),
    "pipeline and tensor parallelism": ({"parallel": Parallel(pipeline=2, tensor=2)}, 4 + 4 + 4 + 2 + 8 + 3),
    "pipeline and expert parallelism: no layer files": (
        {"parallel": Parallel(pipeline=2, expert=2)},
        2 + 4 + 4 + 2 + 3,
    ),
}


@pytest.mark.parametrize(("changes", "expected"), FILES.values(), ids=FILES)
def test_files_of_a_checkpoint_equal_hand_computed_number(changes: dict[str, Any], expected: int):
    assert files_per_checkpoint(tiny_stage(**changes), 4, is_tied=False) == expected + 4, "reference values"


def test_a_pipeline_has_no_file_of_a_tied_head_but_one_for_each_tensor_rank():
    stage = tiny_stage(parallel=Parallel(pipeline=2, tensor=2))
    assert files_per_checkpoint(stage, 4, is_tied=False) - files_per_checkpoint(stage, 4, is_tied=True) == 2
    assert files_per_checkpoint(tiny_stage(), 4, is_tied=True) == files_per_checkpoint(tiny_stage(), 4, is_tied=False)


def test_write_time_follows_from_the_sites_rate():
    partition = Partition(jobs=("gpu",), node=NodeShape(cpus=2, memory_mb=1000))
    site = Site(name="here", scheduler="local", partitions=(partition,))
    assert checkpoint_write_s(10**10, site) == 0
    assert checkpoint_write_s(10**10, site.model_copy(update={"checkpoint_write_gb_per_s": 2.5})) == 4
