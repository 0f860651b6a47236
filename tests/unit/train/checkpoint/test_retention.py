"""Retention of checkpoints: the newest, the best by validation loss, and those that something refers to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longhaul.artifacts.artifact_schemas import Checkpoint, Export
from longhaul.artifacts.atomic_files import file_sha256, write_json
from longhaul.artifacts.paths import JobId
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint.checkpoint_folders import complete_checkpoints, step_folder
from longhaul.train.checkpoint.retention import last_and_best, remove_old_checkpoints
from tests.support.checkpoint_manifest import ANY_HASH, manifest_fields
from tests.support.small_configs import plan_of

LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 1.0, 60: 4.0}
"""Step -> validation loss; at step 40 an allocation ended without a validation."""


def planned_job(folder: Path, **settings: int) -> TrainSpec:
    changes = {f"stages.0.checkpoints.{key}": value for key, value in settings.items()}
    job = job_spec(plan_of(folder / "planned", changes), JobId("train", ("base",)))
    assert isinstance(job, TrainSpec)
    places = {"weights_root": str(folder / "stages/base/weights"), "out": str(folder / "stages/base/checkpoint.json")}
    return job.model_copy(update=places)


def write_checkpoints(folder: Path, losses: dict[int, float | None] = LOSSES) -> Path:
    """Write complete checkpoints of one small file; return their weights folder."""
    weights = folder / "stages/base/weights/0123"
    for step, loss in losses.items():
        checkpoint = step_folder(weights, step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "training_state.json").write_text("{}")
        files = {"training_state.json": {"bytes": 2, "blake3": ANY_HASH}}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest_fields(files, step=step, validation_loss=loss)))
    return weights


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [
        (1, 0, [60]),
        (2, 0, [50, 60]),
        (1, 1, [20, 60]),
        (1, 2, [20, 50, 60]),
        (1, 3, [20, 30, 50, 60]),
        (2, 1, [20, 50, 60]),
        (9, 0, [10, 20, 30, 40, 50, 60]),
        (1, 9, [10, 20, 30, 50, 60]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, keep_last: int, keep_best: int, kept: list[int]):
    weights = write_checkpoints(tmp_path)
    remove_old_checkpoints(weights, planned_job(tmp_path, keep_last=keep_last, keep_best=keep_best))
    assert list(complete_checkpoints(weights)) == kept
    assert len(list(weights.glob("checkpoints/*"))) == len(kept), "no removal is unfinished"


def test_an_incomplete_checkpoint_is_not_counted_and_not_removed(tmp_path: Path):
    weights = write_checkpoints(tmp_path)
    (step_folder(weights, 60) / "training_state.json").unlink()
    remove_old_checkpoints(weights, planned_job(tmp_path, keep_last=1, keep_best=0))
    assert list(complete_checkpoints(weights)) == [50] and step_folder(weights, 60).exists()


def write_reference(folder: Path, reference: str, sha256: str) -> Path:
    """Write a file that refers to the checkpoint of that manifest; return its path."""
    if reference == "its own checkpoint.json":
        path = folder / "stages/base/checkpoint.json"
        saved = {"step": 10, "path": "checkpoints/step-00000010", "sha256": sha256, "validation_loss": None}
        Checkpoint("r", "base", "w", {}, {"last": saved}, 10, "d", "t").write(path)  # type: ignore[arg-type]
    elif reference == "another stage":
        path = folder / "stages/chat/weights/4567/identity.json"
        write_json(path, {"start": sha256})
    else:
        path = folder / "export/base.json"
        Export("base", "c", 10, "p", "fp32", 1, 4, {}, {}, [], {"checkpoint_sha256": sha256}).write(path)
    return path


@pytest.mark.parametrize("reference", ["its own checkpoint.json", "another stage", "an export"])
def test_nothing_is_removed_while_a_reference_cannot_be_read(
    tmp_path: Path, reference: str, capsys: pytest.CaptureFixture[str]
):
    weights = write_checkpoints(tmp_path)
    path = write_reference(tmp_path, reference, ANY_HASH)
    complete = path.read_bytes()
    path.write_bytes(complete[:-20])
    remove_old_checkpoints(weights, planned_job(tmp_path, keep_last=1, keep_best=0))
    assert list(complete_checkpoints(weights)) == sorted(LOSSES)
    assert f"no old checkpoint is removed, as one may still be needed: {path}" in capsys.readouterr().out
    if reference == "another stage":
        path.parent.rename(tmp_path / "moved-away")
    else:
        path.write_bytes(complete)
    remove_old_checkpoints(weights, planned_job(tmp_path, keep_last=1, keep_best=0))
    assert list(complete_checkpoints(weights)) == [60]


@pytest.mark.parametrize("reference", ["its own checkpoint.json", "another stage", "an export"])
def test_a_referenced_checkpoint_is_kept(tmp_path: Path, reference: str):
    weights = write_checkpoints(tmp_path)
    sha256 = file_sha256(step_folder(weights, 10) / "manifest.json")
    write_reference(tmp_path, reference, sha256)
    remove_old_checkpoints(weights, planned_job(tmp_path, keep_last=1, keep_best=0))
    assert list(complete_checkpoints(weights)) == [10, 60]


def test_last_is_the_newest_and_best_the_earlier_of_equal_ones(tmp_path: Path):
    weights = write_checkpoints(tmp_path)
    entries = last_and_best(weights)
    assert {which: entry["step"] for which, entry in entries.items()} == {"last": 60, "best": 20}
    assert entries["best"]["validation_loss"] == 1.0
    assert entries["best"]["sha256"] == file_sha256(weights / entries["best"]["path"] / "manifest.json")


def test_without_validation_there_is_no_best(tmp_path: Path):
    assert set(last_and_best(write_checkpoints(tmp_path, {10: None, 20: None}))) == {"last"}
