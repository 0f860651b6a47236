"""Files of the checkpoints that small trainings write, compared with the plan's number, for every kind that it tells apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.reference_files import REFERENCE_FILES
from longhaul.config.load_config import load_config
from longhaul.planning import build_plan
from tests.parity.tokenizer_and_shards import write_shared_data
from tests.recovery.trained_stages import TrainedStage, train

SHORT = {
    "steps": 2,
    "schedule": {"kind": "constant", "warmup_steps": 0},
    "validation": {"every_steps": 2, "max_samples": 8},
    "checkpoints": {"every_steps": 1, "keep_last": 2, "keep_best": 0},
    "micro_batch_size": 1,
}
"""Two checkpoints, the last of them with reference values."""


ON_DISK = {"offload_optimizer": "nvme", "offload_param": "nvme", "stage3_param_persistence_threshold": 0}


@dataclass(frozen=True)
class Kind:
    """ranks, zero: number of ranks, and keys of `zero`; stage: other keys of the stage"""

    ranks: int
    zero: dict[str, Any]
    stage: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"


def axes(**sizes: int) -> dict[str, Any]:
    return {"parallel": sizes}


KINDS: dict[str, Kind] = {
    "one rank": Kind(1, {"stage": 1}),
    "ZeRO 0": Kind(2, {"stage": 0}),
    "ZeRO 1": Kind(2, {"stage": 1}),
    "no export": Kind(2, {"stage": 1}, {"export": "none"}),
    "ZeRO 1, bf16": Kind(2, {"stage": 1}, {"precision": "bf16"}),
    "ZeRO 2": Kind(2, {"stage": 2}),
    "ZeRO 2, optimizer in CPU memory": Kind(2, {"stage": 2, "offload_optimizer": "cpu"}),
    "ZeRO 3": Kind(2, {"stage": 3}),
    "ZeRO 3, all on a disk": Kind(2, {"stage": 3, **ON_DISK}),
    "ZeRO 3, hpZ": Kind(4, {"stage": 3, "zero_hpz_partition_size": 2}),
    "sequence": Kind(2, {"stage": 1}, axes(sequence=2)),
    "tensor": Kind(2, {"stage": 1}, axes(tensor=2)),
    "tensor, ZeRO 3": Kind(4, {"stage": 3}, axes(tensor=2)),
    "pipeline": Kind(2, {"stage": 1}, axes(pipeline=2)),
    "pipeline, tied embeddings": Kind(2, {"stage": 1}, axes(pipeline=2), "qwen3"),
    "pipeline and tensor, tied embeddings": Kind(4, {"stage": 1}, axes(pipeline=2, tensor=2), "qwen3"),
    "pipeline and data": Kind(4, {"stage": 1}, axes(pipeline=2)),
    "pipeline and tensor": Kind(4, {"stage": 1}, axes(pipeline=2, tensor=2)),
    "pipeline of four ranks": Kind(4, {"stage": 1}, axes(pipeline=4)),
    "pipeline, model with experts": Kind(2, {"stage": 1}, axes(pipeline=2), "deepseek_v3"),
    "expert": Kind(2, {"stage": 1}, axes(expert=2), "deepseek_v3"),
    "expert, ZeRO 2, optimizer in CPU memory": Kind(
        2, {"stage": 2, "offload_optimizer": "cpu"}, axes(expert=2), "deepseek_v3"
    ),
    "expert and data": Kind(4, {"stage": 1}, axes(expert=2), "deepseek_v3"),
    "expert, ZeRO 3": Kind(4, {"stage": 3}, axes(expert=2), "deepseek_v3"),
    "expert and tensor": Kind(4, {"stage": 1}, axes(expert=2, tensor=2), "deepseek_v3"),
    "expert and pipeline": Kind(4, {"stage": 1}, axes(expert=2, pipeline=2), "deepseek_v3"),
}

QUICK = ("ZeRO 0", "ZeRO 3", "tensor", "pipeline, tied embeddings", "expert")
"""`make test` trains these, `make test-all` all kinds."""
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, offload_ops: None, pytestconfig: pytest.Config
) -> dict[str, TrainedStage]:
    folder = tmp_path_factory.mktemp("files")
    shared = write_shared_data(folder / "shared")
    stages = {
        name: TrainedStage(
            folder / name, kind.ranks, stage={**SHORT, "zero": kind.zero, **kind.stage}, model=kind.model
        )
        for name, kind in KINDS.items()
        if name in QUICK or pytestconfig.getoption("all")
    }
    for ranks in sorted({stage.ranks for stage in stages.values()}):
        train(shared, *(stage for stage in stages.values() if stage.ranks == ranks))
    return stages


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_the_last_checkpoint_has_as_many_files_as_the_plan_says(trained: dict[str, TrainedStage], name: str):
    trained_stage = trained[name]
    assert trained_stage.ended == "finished", trained_stage.ended
    planned = build_plan(load_config(trained_stage.folder / "run.yaml")).stages[0]
    last, earlier = (files_in(trained_stage.checkpoint(step)) for step in (2, 1))
    assert len(last) == planned.files_per_checkpoint, last
    assert {*last} - {*earlier} == {f"reference/{file}" for file in REFERENCE_FILES}
