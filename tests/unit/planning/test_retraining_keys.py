"""The result spec holds exactly what a stage's weights depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longhaul.config.load_config import load_config
from longhaul.planning.retraining_keys import result_spec
from tests.support.small_configs import EMPTY_SAFETENSORS, LLAMA, write_config


def specs(folder: Path, changes: dict[str, Any] | None = None, steps: int = 10) -> list[dict[str, Any]]:
    """Return the result spec of each stage of the small config with these changes."""
    loaded = load_config(write_config(folder, changes))
    return [result_spec(loaded, stage, steps) for stage in loaded.config.stages]


def test_spec_has_all_settings_that_change_the_weights(tmp_path: Path):
    base, chat = specs(
        tmp_path,
        {
            "seed": 5,
            "stages.0.optimizer": {"lr": 0.5},
            "stages.0.schedule": {"warmup_steps": 3},
            "stages.0.restart": True,
            "stages.0.router_bias_update_rate": 0.25,
            "stages.0.sequence_aux_loss_coef": 0.125,
            "stages.0.communication": {"data_type": "bf16"},
            "stages.0.compile": "off",
        },
        steps=7,
    )
    model = base.pop("model")
    assert {key: model[key] for key in LLAMA} == LLAMA
    assert base == {
        "seed": 5,
        "kind": "pretrain",
        "dataset": "prose",
        "from": None,
        "steps": 7,
        "restart": True,
        "global_batch_size": 8,
        "sequence_length": 64,
        "optimizer": {"lr": 0.5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "gradient_clipping": 1.0},
        "schedule": {"kind": "cosine", "warmup_steps": 3, "decay_steps": 0, "min_lr_ratio": 0.1},
        "precision": "fp32",
        "fp16": None,
        "router_bias_update_rate": 0.25,
        "sequence_aux_loss_coef": 0.125,
        "compile": "off",
        "communication": {"data_type": "bf16", "powersgd": None},
    }
    assert (chat["kind"], chat["dataset"], chat["restart"]) == ("sft", "chats", False)
    assert chat["from"] == {"stage": "base", "checkpoint": "last"}
    assert json.loads(json.dumps(chat)) == chat


def test_loss_scaling_counts_only_in_fp16(tmp_path: Path):
    (spec, _) = specs(tmp_path, {"stages.0.precision": "fp16", "stages.0.fp16": {"hysteresis": 5}})
    assert spec["fp16"] == {
        "loss_scale": 0.0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 5,
        "min_loss_scale": 1.0,
    }


def test_hub_model_counts_with_id_and_revision(tmp_path: Path):
    (spec, _) = specs(tmp_path, {"model": {"pretrained": {"hub": {"id": "org/model", "revision": "v1"}}}})
    assert spec["model"] == {
        "path": None,
        "hub": {"id": "org/model", "revision": "v1"},
        "trust_remote_code": False,
    }


def test_local_model_counts_with_names_sizes_and_fingerprints_of_its_files(tmp_path: Path):
    folder = tmp_path / "start"
    (folder / "folder").mkdir(parents=True)
    (folder / "model.safetensors").write_text(EMPTY_SAFETENSORS)
    (folder / "config.json").write_text("{}")
    (spec, _) = specs(tmp_path, {"model": {"pretrained": {"path": "start"}}})
    files = spec["model"]["files"]
    assert spec["model"]["path"] == str(folder) and list(files) == ["config.json", "model.safetensors"]
    assert [size for size, _ in files.values()] == [2, 10]


@pytest.mark.parametrize("place", [0, 500_000, 999_999])
def test_other_weights_of_the_same_size_are_another_model(tmp_path: Path, place: int):
    weights = tmp_path / "start/model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(bytes(1_000_000))
    (before, _) = specs(tmp_path, {"model": {"pretrained": {"path": "start"}}})
    changed = bytearray(1_000_000)
    changed[place] = 1
    weights.write_bytes(changed)
    (after, _) = specs(tmp_path, {"model": {"pretrained": {"path": "start"}}})
    assert before["model"] != after["model"]


def test_length_in_epochs_stands_in_place_of_the_steps(tmp_path: Path):
    loaded = load_config(write_config(tmp_path, {"stages.0.steps": ..., "stages.0.epochs": 0.5}))
    spec = result_spec(loaded, loaded.config.stages[0], None)
    assert spec["epochs"] == 0.5 and "steps" not in spec


def test_spec_has_truncate_only_where_it_is_not_the_default(tmp_path: Path):
    assert all("truncate" not in spec for spec in specs(tmp_path))
    assert specs(tmp_path, {"stages.1.truncate": "left"})[1]["truncate"] == "left"
