"""A stage in half precision begins with the fp32 weights of its source, not with their rounding, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longhaul.artifacts.schemas import Checkpoint
from longhaul.checkpoint_io import open_master_weights
from longhaul.export import export_checkpoint as export
from tests.parity.parity_table import make_data
from tests.parity.run_parity_case import prepare
from tests.recovery.trained_stages import STEPS, Leg, train

TWIN = "deepseek_v3"
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
SOURCES = ("start", "pretrained")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, offload_ops: None) -> Leg:
    """A stage that was trained and exported in fp32."""
    folder = tmp_path_factory.mktemp("masters")
    leg = Leg(folder / "source", 2, twin=TWIN)
    train(make_data(folder / "shared"), leg)
    _, job = prepare(leg.folder, folder / "shared", leg.as_json(folder / "shared")["run"])
    export.run(job)
    return leg


@pytest.fixture(scope="module")
def begun(source: Leg) -> dict[tuple[str, str], Leg]:
    """Every layout, begun from the stage and from its export; saved before the first step."""
    begins = {"start": source.folder / "stages/main/checkpoint.json", "pretrained": source.folder / "export"}
    legs = {}
    for kind in SOURCES:
        for name, stage in LAYOUTS.items():
            befalls = {"save_again": True, "stop_after": 0, "begin": f"{kind}={begins[kind]}"}
            folder = source.folder.parent / f"{name}, {kind}"
            legs[name, kind] = Leg(folder, 2, stage={"precision": "bf16", **stage}, befalls=befalls, twin=TWIN)
    train(source.folder.parent / "shared", *legs.values())
    return legs


def first_save(leg: Leg) -> Path:
    return leg.weights / "checkpoints/step-00000000"


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_masters_are_the_sources_bit_for_bit(
    source: Leg, begun: dict[tuple[str, str], Leg], layout: str, kind: str
):
    """As DeepSpeed gathers them from the live engine, and as they are saved."""
    proof = json.loads((first_save(begun[layout, kind]) / "proof/tensors.json").read_text())
    assert {name: entry["sha256_fp32"] for name, entry in proof.items()} == source.masters()
    saved, wanted = open_master_weights(first_save(begun[layout, kind])), source_masters(source)
    assert set(saved) == set(wanted)
    assert all(torch.equal(saved[name].read(), tensor) for name, tensor in wanted.items())


def source_masters(source: Leg) -> dict[str, torch.Tensor]:
    last = Checkpoint.read(source.folder / "stages/main/checkpoint.json").checkpoints["last"]
    return {name: tensor.read() for name, tensor in open_master_weights(source.weights / last["path"]).items()}


def test_the_sources_masters_are_no_bf16_numbers(source: Leg):
    """Else the test above would prove nothing."""
    rounded = [
        name for name, tensor in source_masters(source).items() if not torch.equal(tensor, tensor.bfloat16().float())
    ]
    assert len(rounded) > 30


@pytest.mark.parametrize("kind", SOURCES)
def test_the_model_computes_with_the_rounded_masters(source: Leg, begun: dict[tuple[str, str], Leg], kind: str):
    """Logits of fixed prompts: those of the source's last step but for bf16, which may send a token to another expert."""
    wanted = load_file(source.weights / f"checkpoints/step-{STEPS:08d}/proof/logits.safetensors")["logits"]
    for layout in LAYOUTS:
        found = load_file(first_save(begun[layout, kind]) / "proof/logits.safetensors")["logits"]
        bound = 1e-6 if layout == "ZeRO 0, fp32" else 0.02
        assert (found - wanted).abs().mean() < bound * wanted.abs().mean(), layout
