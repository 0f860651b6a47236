"""A stage in half precision starts from the fp32 weights of its source, not from their rounding, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longhaul.artifacts.artifact_schemas import Checkpoint
from longhaul.checkpoint_io import open_master_weights
from longhaul.export import export_checkpoint as export
from tests.parity.prepare_case import prepare_case
from tests.parity.tokenizer_and_shards import write_shared_data
from tests.recovery.trained_stages import STEPS, TrainedStage, train

MODEL = "deepseek_v3"
LAYOUTS: dict[str, dict[str, Any]] = {
    "ZeRO 0, fp32": {"zero": {"stage": 0}, "precision": "fp32"},
    "ZeRO 1": {"zero": {"stage": 1}},
    "ZeRO 2": {"zero": {"stage": 2}},
    "ZeRO 3": {"zero": {"stage": 3}},
    "ZeRO 3, optimizer on a disk": {"zero": {"stage": 3, "offload_optimizer": "nvme"}},
    "ZeRO 1, tensor 2": {"zero": {"stage": 1}, "parallel": {"tensor": 2}},
    "ZeRO 1, pipeline 2": {"zero": {"stage": 1}, "parallel": {"pipeline": 2}},
    "ZeRO 1, expert 2": {"zero": {"stage": 1}, "parallel": {"expert": 2}},
}
SOURCES = ("checkpoint", "pretrained")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, offload_ops: None) -> TrainedStage:
    """Return a stage that was trained and exported in fp32."""
    folder = tmp_path_factory.mktemp("fp32_start")
    stage = TrainedStage(folder / "source", 2, model=MODEL)
    train(write_shared_data(folder / "shared"), stage)
    _, job = prepare_case(stage.folder, folder / "shared", stage.as_json(folder / "shared")["run"])
    export.run(job)
    return stage


@pytest.fixture(scope="module")
def started(source: TrainedStage) -> dict[tuple[str, str], TrainedStage]:
    """Return every layout, started from the stage and from its export, and saved before the first step."""
    starts = {
        "checkpoint": source.folder / "stages/main/checkpoint.json",
        "pretrained": source.folder / "export/latest",
    }
    stages = {}
    for kind in SOURCES:
        for name, keys in LAYOUTS.items():
            faults = {"save_after_load": True, "kill_at_step": 0, "start": f"{kind}={starts[kind]}"}
            folder = source.folder.parent / f"{name}, {kind}"
            stages[name, kind] = TrainedStage(
                folder, 2, stage={"precision": "bf16", **keys}, faults=faults, model=MODEL
            )
    train(source.folder.parent / "shared", *stages.values())
    return stages


def first_save(stage: TrainedStage) -> Path:
    return stage.checkpoint(0)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_master_weights_have_the_bits_of_the_source(
    source: TrainedStage, started: dict[tuple[str, str], TrainedStage], layout: str, kind: str
):
    """Both as DeepSpeed gathers them from the live engine, and as they are saved."""
    tensors = json.loads((first_save(started[layout, kind]) / "reference/tensors.json").read_text())
    assert {name: entry["sha256_fp32"] for name, entry in tensors.items()} == source.master_hashes()
    saved, expected = open_master_weights(first_save(started[layout, kind])), source_masters(source)
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[name].read(), tensor) for name, tensor in expected.items())


def source_masters(source: TrainedStage) -> dict[str, torch.Tensor]:
    last = Checkpoint.read(source.folder / "stages/main/checkpoint.json").checkpoints["last"]
    return {name: tensor.read() for name, tensor in open_master_weights(source.weights / last["path"]).items()}


def test_the_source_has_weights_that_are_no_bf16_numbers(source: TrainedStage):
    """Otherwise the test above would show nothing."""
    rounded = [
        name for name, tensor in source_masters(source).items() if not torch.equal(tensor, tensor.bfloat16().float())
    ]
    assert len(rounded) > 30


@pytest.mark.parametrize("kind", SOURCES)
def test_the_model_computes_with_the_rounded_master_weights(
    source: TrainedStage, started: dict[tuple[str, str], TrainedStage], kind: str
):
    """Its logits are those of the source's last step, apart from bf16 rounding, which may route a token to another expert."""
    expected = load_file(source.checkpoint(STEPS) / "reference/logits.safetensors")["logits"]
    for layout in LAYOUTS:
        found = load_file(first_save(started[layout, kind]) / "reference/logits.safetensors")["logits"]
        bound = 1e-6 if layout == "ZeRO 0, fp32" else 0.02
        assert (found - expected).abs().mean() < bound * expected.abs().mean(), layout
