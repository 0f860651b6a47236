"""Writes the config of a case into a folder of its own and plans its jobs, as for a user's run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.artifacts.atomic_files import write_text
from longhaul.artifacts.paths import JobId
from longhaul.config.load_config import load_config
from longhaul.config.stage_config import StartFrom
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.export_job import ExportSpec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.jobs.launch_files import render_job
from longhaul.planning import build_plan
from tests.parity.parity_cases import BALANCE, GLOBAL_BATCH, LAYOUTS, MODELS, OPTIMIZER, TASKS

STEPS = 10
SEED = 2  # one of the few seeds with which rounding alone changes no model: see parity_table._check_sensitivity
SITE = {
    "name": "here",
    "scheduler": "local",
    "partitions": [{"jobs": ["gpu"], "node": {"cpus": 8, "memory_mb": 8000}}],
}


def run_config(model: str, layout: str, **stage: Any) -> dict[str, Any]:
    """Return the run config of a case, without data; `stage` replaces keys of its only stage."""
    chosen = LAYOUTS[layout]
    return {
        "run": "case",
        "site": "./site.yaml",
        "seed": SEED,
        "model": MODELS[model],
        "trackers": {"tensorboard": False},
        "storage": {"scratch": tempfile.gettempdir()},
        "checks": {"nodes": 1},
        "stages": [
            {
                "name": "main",
                "steps": STEPS,
                "global_batch_size": GLOBAL_BATCH,
                "sequence_length": 64,
                "precision": "fp32",
                "optimizer": OPTIMIZER,
                "schedule": {"kind": "constant", "warmup_steps": 3},
                **BALANCE.get(next(iter(MODELS[model])), {}),
                "gpus_per_node": chosen.ranks,
                # Not a multiple of the ranks' micro batches.
                "validation": {"every_steps": STEPS, "max_samples": 7},
                "checkpoints": {"every_steps": STEPS // 2, "keep_last": 2},
                "export": "last",
                "export_dtype": "fp32",
                **TASKS[chosen.task],
                **chosen.stage,
                **stage,
            }
        ],
    }


def _datasets(shared: Path) -> dict[str, Any]:
    return {
        name: {"kind": kind, "files": [str(shared / f"{name}.jsonl")], "validation_fraction": 0.1}
        for name, kind in (("chats", "chat"), ("texts", "text"))
    }


def prepare_case(folder: Path, shared: Path, run: dict[str, Any], start: str = "") -> tuple[TrainSpec, ExportSpec]:
    """Write config and launch files of a case into `folder`; return the specs of its train and export job.

    shared: folder of the tokenizer and the shards that all cases share
    start:  source of the first weights: "" for the seed, "pretrained=<Hugging Face folder>", or
            "checkpoint=<checkpoint.json of another case>"
    """
    kind, _, source = start.partition("=")
    if kind == "pretrained":
        run = {**run, "model": {"pretrained": {"path": source}}}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "site.yaml", yaml.safe_dump(SITE))
    tokenizer = TokenizerManifest.read(shared / "tokenizer.json").path
    write_text(
        folder / "run.yaml", yaml.safe_dump({**run, "tokenizer": {"path": tokenizer}, "datasets": _datasets(shared)})
    )
    plan = build_plan(load_config(folder / "run.yaml"))
    name = run["stages"][0]["name"]
    stage_folder = folder / "stages" / name
    render_job(plan, JobId("train", (name,)), folder).write(stage_folder)
    paths = {
        "tokenizer": str(shared / "tokenizer.json"),
        "data": str(shared / plan.stages[0].stage.dataset / "data.json"),
        "deepspeed": str(stage_folder / "ds_config.json"),
        "folder": str(stage_folder),
        "weights_root": str(stage_folder / "weights"),
        "out": str(stage_folder / "checkpoint.json"),
    }
    if kind == "checkpoint":
        paths["start_checkpoint"] = source
    train_job, export_job = job_spec(plan, JobId("train", (name,))), job_spec(plan, JobId("export", (name,)))
    assert isinstance(train_job, TrainSpec) and isinstance(export_job, ExportSpec)
    stage = train_job.stage.model_copy(update={"start_from": StartFrom(stage="main")} if kind == "checkpoint" else {})
    return train_job.model_copy(update={**paths, "stage": stage}), export_job.model_copy(
        update={
            "checkpoint": paths["out"],
            "tokenizer": paths["tokenizer"],
            "folder": str(folder / "export"),
            "out": str(folder / "export.json"),
        }
    )
