"""Which checkpoints stay: the newest, the best by validation loss, and what others began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.files import file_sha256
from longhaul.jobs.builders import payload
from longhaul.jobs.specs import TrainSpec
from longhaul.train.checkpoint.folders import complete_checkpoints, step_folder
from longhaul.train.checkpoint.manager import Checkpoints
from longhaul.train.monitoring.events import Events
from tests.support.small_configs import plan_of

LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 1.0, 60: 4.0}
"""Step -> validation loss; at 40 an allocation ended, and nothing was validated."""


def checkpoints(folder: Path, losses: dict[int, float | None] = LOSSES, **settings: int) -> Checkpoints:
    """Whole checkpoints of one small file in the weights folder of a planned stage."""
    changes = {f"stages.0.checkpoints.{key}": value for key, value in settings.items()}
    job = payload(plan_of(folder / "planned", changes), "train-base")
    assert isinstance(job, TrainSpec)
    places = {"weights_root": str(folder / "stages/base/weights"), "out": str(folder / "stages/base/checkpoint.json")}
    weights = folder / "stages/base/weights/0123"
    for step, loss in losses.items():
        save(weights, step, loss)
    unused: Any = None  # the processes: nothing is saved or loaded
    return Checkpoints(weights, job.model_copy(update=places), unused, Events(None))


def save(weights: Path, step: int, loss: float | None) -> None:
    folder = step_folder(weights, step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    files = {"state.json": {"bytes": 2, "sha256": "…"}}
    (folder / "manifest.json").write_text(json.dumps({"step": step, "validation_loss": loss, "files": files}))


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "stay"),
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
def test_the_newest_and_the_best_stay(tmp_path: Path, keep_last: int, keep_best: int, stay: list[int]):
    kept = checkpoints(tmp_path, keep_last=keep_last, keep_best=keep_best)
    kept._thin_out()
    assert list(complete_checkpoints(kept.folder)) == stay
    assert len(list(kept.folder.glob("checkpoints/*"))) == len(stay), "nothing is left half removed"


def test_a_half_saved_one_counts_for_nothing_and_is_left(tmp_path: Path):
    kept = checkpoints(tmp_path, keep_last=1, keep_best=0)
    (step_folder(kept.folder, 60) / "state.json").unlink()
    kept._thin_out()
    assert list(complete_checkpoints(kept.folder)) == [50] and step_folder(kept.folder, 60).exists()


@pytest.mark.parametrize("pointer", ["its own checkpoint.json", "another stage", "an export"])
def test_what_others_began_with_stays(tmp_path: Path, pointer: str):
    kept = checkpoints(tmp_path, keep_last=1, keep_best=0)
    sha256 = file_sha256(step_folder(kept.folder, 10) / "manifest.json")
    written = {
        "its own checkpoint.json": ("stages/base/checkpoint.json", {"checkpoints": {"last": {"sha256": sha256}}}),
        "another stage": ("stages/chat/weights/4567/identity.json", {"start": sha256}),
        "an export": ("export/base.json", {"provenance": {"checkpoint_sha256": sha256}}),
    }
    name, content = written[pointer]
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(json.dumps(content))
    kept._thin_out()
    assert list(complete_checkpoints(kept.folder)) == [10, 60]


def test_last_is_the_newest_and_best_the_earlier_of_equals(tmp_path: Path):
    found = checkpoints(tmp_path).last_and_best()
    assert {which: entry["step"] for which, entry in found.items()} == {"last": 60, "best": 20}
    assert found["best"]["validation_loss"] == 1.0
    assert found["best"]["sha256"] == file_sha256(
        tmp_path / "stages/base/weights/0123" / found["best"]["path"] / "manifest.json"
    )


def test_without_validation_there_is_no_best(tmp_path: Path):
    assert set(checkpoints(tmp_path, {10: None, 20: None}).last_and_best()) == {"last"}
