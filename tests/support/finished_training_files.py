"""Files that finished trainings of the small config leave: artifacts, weights folders with an identity, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from longhaul.artifacts.artifact_schemas import (
    Checkpoint,
    DataManifest,
    Export,
    SavedCheckpoint,
    Split,
    TokenizerManifest,
)
from longhaul.artifacts.atomic_files import file_blake3, file_sha256, write_json, write_text
from longhaul.artifacts.job_state import utc_now
from longhaul.artifacts.line_records import append_record
from longhaul.artifacts.paths import JobId, WeightsFolder
from longhaul.jobs.job_kind import job_spec, jobs_of
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.planning import Plan
from longhaul.train.checkpoint.weights_identity import find_starting_checkpoint, weights_folder, weights_identity
from tests.support.checkpoint_manifest import manifest_fields

SPLIT: Split = {"shards": [], "tokens": 1, "documents": 1, "loss_tokens": 1}


def write_trained_results(plan: Plan) -> None:
    """Write the results of both stages of the small config, into the current folder; an export of stage base is among them."""
    TokenizerManifest("t", "t0", 400, None, 1, 2, True, {}, []).write(plan.paths.tokenizer)
    for name in ("prose", "chats"):
        data = DataManifest(name, "text", "d", f"{name}0", "t0", "uint16", {"train": SPLIT}, [], {}, 1.0)
        data.write(plan.paths.manifest(name))
    for job in jobs_of(plan):
        job_spec(plan, job).write(plan.paths.job(job).job_spec)
    weights = {stage: train(plan, stage, steps=10) for stage in ("base", "chat")}
    checkpoint = str(WeightsFolder(weights["base"]).checkpoint(10))
    export = Export("base", checkpoint, 10, "results/small/export/base/old", "bf16", 1, 2, {}, {}, [], {})
    export.write(plan.paths.export_manifest("base"))


def train(plan: Plan, stage: str, steps: int) -> Path:
    """Write what a training of `steps` steps leaves, and return its weights folder. checkpoint.json follows the last step."""
    job = cast(TrainSpec, job_spec(plan, JobId("train", (stage,))))
    data, tokenizer = DataManifest.read(Path(job.data)), TokenizerManifest.read(Path(job.tokenizer))
    identity = weights_identity(job, data, tokenizer, find_starting_checkpoint(job))
    weights = weights_folder(job, identity)
    write_json(WeightsFolder(weights).identity, {**identity, "steps": job.steps})
    append_record(WeightsFolder(weights).attempts, {"time": utc_now(), "hosts": ["n1"], "device": "cpu"})
    checkpoint = WeightsFolder(weights).checkpoint(steps)
    _write_checkpoint(checkpoint, f"{weights.name} {steps}")
    if steps == job.steps:
        sha256 = file_sha256(checkpoint / "manifest.json")
        path = f"checkpoints/{checkpoint.name}"
        entry: SavedCheckpoint = {"step": steps, "path": path, "sha256": sha256, "validation_loss": None}
        Checkpoint("small", stage, str(weights), job.spec, {"last": entry}, steps, data.hash, "t0").write(Path(job.out))
    return weights


def _write_checkpoint(folder: Path, content: str) -> None:
    write_text(folder / "x.pt", content)
    files = {"x.pt": {"bytes": len(content), "blake3": file_blake3(folder / "x.pt")}}
    step = int(folder.name.removeprefix("step-"))
    layout = {"zero_stage": 1, "parallel": {"tensor": 1}}
    write_json(folder / "manifest.json", manifest_fields(files, step=step, has_reference_values=True, **layout))
