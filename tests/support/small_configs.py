"""Small configs for tests of planning, rendering and error messages. They train nothing and read only their own files."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import yaml

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.artifacts.paths import JobId
from longhaul.config.hub_tensors import hub_tensors
from longhaul.config.load_config import load_config
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.planning import Plan, build_plan

LLAMA = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
DEEPSEEK_V2 = {key: value for key, value in DEEPSEEK.items() if key not in ("n_group", "topk_group")}
STAGE = {
    "name": "base",
    "kind": "pretrain",
    "dataset": "prose",
    "steps": 10,
    "global_batch_size": 8,
    "sequence_length": 64,
    "precision": "fp32",
}
CHAT = {**STAGE, "name": "chat", "kind": "sft", "dataset": "chats", "from": {"stage": "base"}}
CONFIG = {
    "run": "small",
    "site": "./site.yaml",
    "tokenizer": {"train": {"vocab_size": 400, "datasets": ["prose"]}},
    "datasets": {
        "prose": {"kind": "text", "python_stdlib": {}},
        "chats": {"kind": "chat", "python_stdlib": {}},
    },
    "model": {"llama": LLAMA},
    "checks": {"nodes": 1},
    "stages": [STAGE, CHAT],
}
SITE: dict[str, Any] = {
    "name": "centre",
    "partitions": [
        {
            "jobs": ["gpu", "cpu", "debug"],
            "name": "gpu",
            "max_minutes": 1440,
            "max_nodes": 16,
            "node": {"cpus": 64, "memory_mb": 500_000, "gpus": 8},
        }
    ],
    "accelerator": {"cuda": "13.0"},
}
LOCAL: dict[str, Any] = {"scheduler": "local", "partitions.0.max_nodes": 1}
"""Changes of SITE for a site of this machine."""


def changed(value: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with some keys changed: {"stages.0.optimizer.lr": 1.0}. The value ... removes a key."""
    value = copy.deepcopy(value)
    for dotted, new in changes.items():
        *path, last = [int(part) if part.isdigit() else part for part in dotted.split(".")]
        section: Any = value
        for part in path:
            section = section[part] if isinstance(part, int) else section.setdefault(part, {})
        if new is ...:
            del section[last]
        else:
            section[last] = copy.deepcopy(new)
    return value


def write_config(folder: Path, config: dict[str, Any] | None = None, site: dict[str, Any] | None = None) -> Path:
    """Write CONFIG and SITE with these changes to run.yaml and site.yaml. Return the path of run.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(changed(CONFIG, config or {}), sort_keys=False, allow_unicode=True))
    (folder / "site.yaml").write_text(yaml.safe_dump(changed(SITE, site or {}), sort_keys=False, allow_unicode=True))
    return path


def plan_of(
    folder: Path, config: dict[str, Any] | None = None, site: dict[str, Any] | None = None, lock: Lock | None = None
) -> Plan:
    """Return the plan of CONFIG and SITE with these changes."""
    return build_plan(load_config(write_config(folder, config, site)), lock)


def base_stage(folder: Path, **trackers: bool) -> TrainSpec:
    """Return the job spec of CONFIG's first stage for one process and these trackers."""
    switches = {f"trackers.{name}": is_on for name, is_on in {"tensorboard": False, **trackers}.items()}
    job = job_spec(plan_of(folder / "planned", {**switches, "stages.0.gpus_per_node": 1}), JobId("train", ("base",)))
    assert isinstance(job, TrainSpec)
    return job


EMPTY_SAFETENSORS = "\2\0\0\0\0\0\0\0{}"
"""The text of a valid safetensors file without tensors."""


def write_weights(path: Path, config: dict[str, Any]) -> None:
    """Write a safetensors file with the tensors of a config.json. Its data are a hole, which takes no space."""
    header, end = {}, 0
    for name, shape in hub_tensors(config):
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(stream.tell() + end)
