"""GPU-hours are estimated from measurements of similar trainings, and each measurement is stated as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.gpu_speed_rows import MODELS
from longhaul.config.load_config import load_config
from longhaul.config.model_size import ModelSize, model_size
from longhaul.planning import build_plan
from longhaul.planning.gpu_hours import HoursEstimate, MfuEstimate, estimate_mfu, measured_speeds
from longhaul.report.plan_json import plan_json
from tests.support.pipeline_run import REPOSITORY
from tests.support.small_configs import plan_of

PEAK = 989e12
H100 = {"partitions.0.node.gpu_peak_tflops": 989.0, "interconnect": {"kind": "infiniband"}}
FP8_GAIN = 0.654 / 0.547  # of the dense model on one GPU
MOE = {
    "qwen3_moe": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 40960,
    }
}
LLAMA_70B = {
    "llama": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    }
}


def example(name: str) -> Path:
    return REPOSITORY / "config" / "examples" / f"{name}.yaml"


def size_of(model: dict[str, Any], folder: Path) -> ModelSize:
    folder.mkdir()
    changes: dict[str, Any] = {"model": model, "tokenizer.train.vocab_size": 300}
    sizes = build_plan(plan_of(folder, changes).loaded).stages[0].sizes
    assert sizes
    return sizes


def test_every_mfu_follows_from_the_published_tokens_per_second(tmp_path: Path):
    sizes = {
        "dense model of 1.2 B": size_of(MODELS["dense"], tmp_path / "a"),
        "mixture of experts of 1.0 B": size_of(MODELS["mixture"], tmp_path / "b"),
        "Qwen3 MoE 30B": size_of(MOE, tmp_path / "c"),
        "Llama 3 70B": size_of(LLAMA_70B, tmp_path / "d"),
        "Llama 3.1 8B": model_size(load_config(example("llama-8b-pretrain")).config.model.config_dict()),
        "DeepSeek V3 671B": model_size(load_config(example("deepseek-v3-671b")).config.model.config_dict()),
    }
    checked = 0
    for row in measured_speeds():
        if tokens_per_s := row["tokens_per_s_per_gpu"]:
            flops = sizes[row["name"].split(",")[0]].flops_per_token(row["features"]["sequence_length"])
            assert row["mfu"] == pytest.approx(tokens_per_s * flops / PEAK, abs=6e-4), row["name"]
            checked += 1
    assert checked == 17


def test_every_measurement_is_in_the_docs():
    lines = (REPOSITORY / "docs" / "reference" / "speeds.md").read_text().splitlines()
    for row in measured_speeds():
        tokens = f"{row['tokens_per_s_per_gpu']:,}" if row["tokens_per_s_per_gpu"] else "not published"
        cells = [
            f"| {row['name']} | {row['gpus']:,} x {row['card']} | {row['precision']} |",
            f"| {row['features']['sequence_length']:,} | {tokens} | {100 * row['mfu']:.1f} % |",
            row["source"].split(",")[0],
            row["url"],
            row["date"],
        ]
        assert len([line for line in lines if all(cell in line for cell in cells)]) == 1, cells


def test_the_671b_example_takes_what_published_runs_took():
    """NeMo AutoModel trained this model in bf16 with the same axes at 865 and 1,002 tokens/s and GPU."""
    plan = build_plan(load_config(example("deepseek-v3-671b-3d")))
    row = plan_json(plan)["stages"][0]
    low, high = row["gpu_hours_range"]
    assert low == pytest.approx(row["tokens"] / 1002 / 3600, rel=2e-3)
    assert high == pytest.approx(row["tokens"] / 865 / 3600, rel=2e-3)
    assert all("DeepSeek V3 671B" in name for name in row["gpu_hours_basis"]) and len(row["gpu_hours_basis"]) == 2
    assert row["gpu_hours_unmeasured"] == []


def test_hours_follow_from_flops_peak_and_mfu():
    """An hour at 100 TFLOP/s and an MFU of 0.4 are 40 TFLOP-hours."""
    found = MfuEstimate(0.2, 0.4, ("a",), ("b",)).gpu_hours(flops=1000e12 * 3600, peak_tflops=100.0)
    assert found == HoursEstimate(25.0, 50.0, ("a",), ("b",))


# keys of a stage, MFU, what was not measured
CASES: dict[str, tuple[dict[str, Any], tuple[float, float], tuple[str, ...]]] = {
    "one GPU": ({}, (0.547, 0.547), ()),
    "one GPU, FP8": ({"precision": "fp8"}, (0.654, 0.654), ()),
    "one node, ZeRO 1": ({"gpus_per_node": 8}, (0.534, 0.534), ()),
    "one node, ZeRO 3": ({"zero": {"stage": 3}, "gpus_per_node": 8}, (0.347, 0.508), ()),
    "one node, ZeRO 3, full recomputation": (
        {"zero": {"stage": 3}, "activation_checkpointing": "full", "gpus_per_node": 8},
        (0.347, 0.451),
        (),
    ),
    "one GPU, full recomputation": ({"activation_checkpointing": "full"}, (0.547, 0.547), ("full recomputation",)),
    "one node, ZeRO 3, FP8": (
        {"precision": "fp8", "zero": {"stage": 3}, "gpus_per_node": 8},
        (FP8_GAIN * 0.347, FP8_GAIN * 0.508),
        (),
    ),
    "not compiled": ({"zero": {"stage": 3}, "compile": "off", "gpus_per_node": 8}, (0.3, 0.3), ()),
    "16 nodes, ZeRO 3": ({"zero": {"stage": 3}, "nodes": 16, "gpus_per_node": 8}, (0.339, 0.339), ()),
    "tensor and pipeline": (
        {"parallel": {"tensor": 2, "pipeline": 2}, "nodes": 2, "gpus_per_node": 8},
        (0.41, 0.43),
        (),
    ),
    "offload": (
        {"zero": {"stage": 3, "offload_optimizer": "cpu"}, "gpus_per_node": 8},
        (0.347, 0.508),
        ("offload",),
    ),
}


@pytest.mark.parametrize(("keys", "mfu", "unmeasured"), CASES.values(), ids=CASES)
def test_measurements_like_the_stage_are_used(
    tmp_path: Path, keys: dict[str, Any], mfu: tuple[float, float], unmeasured: tuple[str, ...]
):
    stage = {"precision": "bf16", "global_batch_size": 256, **keys}
    plan = plan_of(tmp_path, {f"stages.0.{key}": value for key, value in stage.items()}, H100)
    planned = plan.stages[0]
    assert planned.sizes
    found = estimate_mfu(planned.stage, planned.sizes, plan.site)
    assert (found.low, found.high) == mfu and found.unmeasured == unmeasured


def test_a_network_that_was_not_measured_is_named(tmp_path: Path):
    keys = {"stages.0.precision": "bf16", "stages.0.nodes": 2, "stages.0.gpus_per_node": 4}
    plan = plan_of(tmp_path, keys, {**H100, "interconnect": {"kind": "ethernet"}})
    planned = plan.stages[0]
    assert planned.sizes
    assert "ethernet between nodes" in estimate_mfu(planned.stage, planned.sizes, plan.site).unmeasured


def test_the_speed_of_fp8_is_not_promised_to_stages_in_bf16():
    assert {row["precision"] for row in measured_speeds()} == {"bf16", "fp8"}
    for name in ("deepseek-v3-671b", "deepseek-v3-671b-3d", "llama-8b-pretrain"):
        plan = build_plan(load_config(example(name)))
        for planned in plan.stages:
            assert planned.sizes and estimate_mfu(planned.stage, planned.sizes, plan.site).high < 0.55


def test_hours_are_unknown_without_a_peak(tmp_path: Path):
    row = plan_json(plan_of(tmp_path))["stages"][0]
    assert (row["gpu_hours_range"], row["gpu_hours_basis"]) == (None, [])
