"""The job of one cell: a config in a folder of its own, planned as a user's is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml

from longhaul.artifacts.files import write_text
from longhaul.artifacts.schemas import TokenizerManifest
from longhaul.config.load import load_config
from longhaul.config.run_config import StartFrom
from longhaul.jobs.builders import payload
from longhaul.jobs.launch_files import render_stage
from longhaul.jobs.specs import ExportSpec, TrainSpec
from longhaul.planning import make_plan
from tests.parity.parity_cases import GLOBAL_BATCH, LAYOUTS, MODELS

STEPS = 10
SEED = 38  # one of the few with which no twin feels rounding: parity_table._well_posed
SITE = {
    "name": "here",
    "scheduler": "local",
    "max_nodes": 1,
    "node": {"cpus": 8, "memory_mb": 8000},
    "gpu_request": "none",
}


def config(twin: str, layout: str, **stage: Any) -> dict[str, Any]:
    """The run of a cell; `stage` replaces keys of its only stage."""
    chosen = LAYOUTS[layout]
    return {
        "run": "cell",
        "site": "./site.yaml",
        "seed": SEED,
        "model": MODELS[twin],
        "trackers": {"tensorboard": False},
        "storage": {"scratch": tempfile.gettempdir()},
        "checks": {"nodes": 1},
        "stages": [
            {
                "name": "main",
                "kind": "sft",
                "dataset": "chats",
                "steps": STEPS,
                "global_batch_size": GLOBAL_BATCH,
                "sequence_length": 64,
                "precision": "fp32",
                # A larger eps than usual: with 1e-8 Adam makes a step of full size of the rounding of a gradient near zero,
                # as an expert has that few tokens reach, and the bounds would judge that and not the layout.
                "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "gradient_clipping": 0.5, "eps": 1e-6},
                "schedule": {"kind": "constant", "warmup_steps": 3},
                "router_bias_update_rate": 0.01,
                # So heavy that it shows in the gradient norms of every cell.
                "sequence_aux_loss_coef": 0.1,
                "gpus_per_node": chosen.ranks,
                "validation": {"every_steps": STEPS, "max_samples": 8},
                "checkpoints": {"every_steps": STEPS // 2, "keep_last": 2},
                "export": "last",
                "export_dtype": "fp32",
                **chosen.stage,
                **stage,
            }
        ],
    }


def _datasets(shared: Path) -> dict[str, Any]:
    return {"chats": {"kind": "chat", "files": [str(shared / "chats.jsonl")], "validation_fraction": 0.1}}


def prepare(folder: Path, shared: Path, run: dict[str, Any], begin: str = "") -> tuple[TrainSpec, ExportSpec]:
    """Writes config and rendered files of a cell into `folder`; tokenizer and shards are those of `shared`.

    begin: where its weights come from: "", "pretrained=<folder>" or "start=<checkpoint.json of another cell>".
    """
    kind, _, source = begin.partition("=")
    if kind == "pretrained":
        run = {**run, "model": {"pretrained": {"path": source}}}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "site.yaml", yaml.safe_dump(SITE))
    tokenizer = TokenizerManifest.read(shared / "tokenizer.json").path
    write_text(
        folder / "run.yaml", yaml.safe_dump({**run, "tokenizer": {"path": tokenizer}, "datasets": _datasets(shared)})
    )
    plan = make_plan(load_config(folder / "run.yaml"))
    name = run["stages"][0]["name"]
    stage_folder = folder / "stages" / name
    render_stage(plan, name, folder).write(stage_folder)
    paths = {
        "tokenizer": str(shared / "tokenizer.json"),
        "data": str(shared / "data.json"),
        "deepspeed": str(stage_folder / "ds_config.json"),
        "folder": str(stage_folder),
        "weights_root": str(stage_folder / "weights"),
        "out": str(stage_folder / "checkpoint.json"),
    }
    if kind == "start":
        paths["start_checkpoint"] = source
    stage_job, convert_job = payload(plan, f"train-{name}"), payload(plan, f"convert-{name}")
    assert isinstance(stage_job, TrainSpec) and isinstance(convert_job, ExportSpec)
    stage = stage_job.stage.model_copy(update={"start_from": StartFrom(stage="main")} if kind == "start" else {})
    return stage_job.model_copy(update={**paths, "stage": stage}), convert_job.model_copy(
        update={
            "checkpoint": paths["out"],
            "tokenizer": paths["tokenizer"],
            "folder": str(folder / "export"),
            "out": str(folder / "export.json"),
        }
    )
