"""Checkpoints that are damaged, incomplete or too large for the disk: the newest undamaged one is used, and none is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import Checkpoint, Export
from longhaul.artifacts.atomic_files import file_blake3, file_sha256, write_json
from longhaul.train.checkpoint.checkpoint_folders import partial_folder, referenced_checkpoints
from tests.faults.doctor_answers import assert_doctor_names_from_log
from tests.parity.tokenizer_and_shards import write_shared_data
from tests.recovery.trained_stages import TrainedStage, train

NEWEST, BEFORE = "step-00000006", "step-00000003"
OPTIMIZER = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def flip_bit(folder: Path) -> None:
    path = folder / OPTIMIZER
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / OPTIMIZER
    path.write_bytes(path.read_bytes()[:-100])


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def truncate_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:80])


def remove_file(folder: Path) -> None:
    (folder / OPTIMIZER).unlink()


def interrupt_save(folder: Path) -> None:
    remove_manifest(folder)
    folder.rename(partial_folder(folder))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip_bit, f"{OPTIMIZER} does not have the hash of the manifest"),
    "truncated file": (truncate, f"{OPTIMIZER} has "),
    "missing manifest": (remove_manifest, "manifest.json is missing"),
    "truncated manifest": (truncate_manifest, "manifest.json cannot be read"),
    "missing file": (remove_file, f"{OPTIMIZER} is missing"),
    "interrupted save": (interrupt_save, ""),
}


def change_manifest(stage: TrainedStage, key: str, value: object) -> None:
    path = stage.weights / "checkpoints" / NEWEST / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> TrainedStage:
    folder = tmp_path_factory.mktemp("damaged")
    stage = TrainedStage(folder / "half", 2, faults={"kill_at_step": 7}, stage={"export": "last"})
    train(write_shared_data(folder / "shared"), stage)
    return stage


@pytest.fixture(scope="module")
def resumed(half: TrainedStage) -> tuple[dict[str, TrainedStage], str]:
    """Return the resumed stages, one per damage, and the output of their ranks."""
    folder, stages = half.folder.parent, {}
    for name in ("undisturbed", *DAMAGES, "other weights"):
        stages[name] = TrainedStage(folder / name, 2, stage={"export": "last"})
        shutil.copytree(half.folder, stages[name].folder)
        if name in DAMAGES:
            DAMAGES[name][0](stages[name].weights / "checkpoints" / NEWEST)
    change_manifest(stages["other weights"], "weights", "0123456789abcdef")
    return stages, train(folder / "shared", *stages.values())


@pytest.mark.parametrize("name", DAMAGES)
def test_the_newest_undamaged_checkpoint_is_used(resumed: tuple[dict[str, TrainedStage], str], name: str):
    stage, reason = resumed[0][name], DAMAGES[name][1]
    assert stage.ended == "finished"
    assert [event["step"] for event in stage.events("resumed")] == [3]
    assert stage.master_hashes() == resumed[0]["undisturbed"].master_hashes()
    assert [event["reason"].startswith(reason) for event in stage.events("checkpoint_damaged")] == [True] * bool(reason)
    assert (f"{NEWEST}.corrupt" in stage.checkpoints) == bool(reason)
    assert not any(name.endswith(("partial", "removed")) for name in stage.checkpoints)
    if reason:
        assert f"{stage.weights / 'checkpoints' / NEWEST} is damaged: {reason}".split("/stages/")[1] in resumed[1]


def test_doctor_names_a_damaged_checkpoint(resumed: tuple[dict[str, TrainedStage], str], tmp_path: Path):
    assert_doctor_names_from_log("newest checkpoint damaged", tmp_path, resumed[0]["flipped bit"].printed)


def test_a_checkpoint_of_other_weights_is_refused(resumed: tuple[dict[str, TrainedStage], str]):
    stage = resumed[0]["other weights"]
    assert f"{NEWEST} belongs to the weights 0123456789abcdef" in stage.ended
    assert stage.checkpoints == [BEFORE, NEWEST]


def test_a_checkpoint_of_another_release_is_refused(half: TrainedStage, tmp_path: Path):
    """It is neither used nor renamed, and no earlier one is used in its place."""
    stage = TrainedStage(tmp_path / "later release", 1)
    shutil.copytree(half.folder, stage.folder)
    change_manifest(stage, "schema_version", 3)
    train(half.folder.parent / "shared", stage)
    assert f"{NEWEST}/manifest.json has schema version 3, this release of longhaul reads version 2" in stage.ended
    assert stage.checkpoints == [BEFORE, NEWEST]


def test_every_file_is_in_the_manifest_with_its_hash(half: TrainedStage):
    """The hashes were computed while the files were written."""
    folder = half.weights / "checkpoints" / NEWEST
    stated = json.loads((folder / "manifest.json").read_text())["files"]
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(stated) == found and len(found) == 6
    for name, entry in stated.items():
        assert entry == {"bytes": (folder / name).stat().st_size, "blake3": file_blake3(folder / name)}


def test_a_full_disk_loses_no_checkpoint(half: TrainedStage, tmp_path: Path):
    """The file system has space for two checkpoints, but not for three."""
    size = sum(path.stat().st_size for path in (half.weights / "checkpoints" / NEWEST).iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    stage = TrainedStage(disk, 2)
    mount = f"mount -t tmpfs -o size={int(2.6 * size)} none {disk}"
    output = train(
        half.folder.parent / "shared",
        stage,
        command_prefix=["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"],
    )
    assert stage.checkpoints == [BEFORE, NEWEST], output[-3000:]
    # Training continues while the files of a checkpoint are written: metrics.jsonl may be the first that finds no space.
    if not stage.ended.startswith("DiskFull: a file of the stage needs more free space"):
        assert stage.ended.startswith("DiskFull: a checkpoint needs ")
        needed = int(stage.ended.split(" needs ")[1].split(" bytes")[0])
        assert needed == pytest.approx(size, rel=0.02)
    assert f"free space in {stage.folder}/stages/main/weights" in stage.ended
    assert "bytes (0.00 GiB) are free" in stage.ended


def test_references_are_found_in_all_three_places(tmp_path: Path):
    """In the stage's own checkpoint.json, in the identity of weights that started from a checkpoint, and in an export."""
    last, best, start, exported, other = (letter * 64 for letter in "abcde")
    run = tmp_path / "results/run"
    own = run / "stages/main"
    saved = {"step": 1, "path": "checkpoints/step-00000001", "validation_loss": None}
    checkpoints: Any = {"last": {**saved, "sha256": last}, "best": {**saved, "sha256": best}}
    Checkpoint("run", "main", str(own), {}, checkpoints, 1, "d", "t").write(own / "checkpoint.json")
    write_json(run / "stages/chat/weights/01/identity.json", {"start": start})
    write_json(run / "stages/tune/weights/02/identity.json", {"start": None})
    provenance = {"checkpoint_sha256": exported}
    Export("main", "c", 1, "p", "fp32", 1, 4, {}, {}, [], provenance).write(run / "export/main.json")
    assert referenced_checkpoints(own / "weights", own / "checkpoint.json") == {last, best, start, exported}
    write_json(tmp_path / "big/run/chat/03/identity.json", {"start": other})
    assert referenced_checkpoints(tmp_path / "big/run/main", own / "checkpoint.json") == {last, best, exported, other}


def test_a_referenced_checkpoint_is_not_removed(half: TrainedStage, tmp_path: Path):
    """A stage that resumes keeps the one checkpoint from which another stage started."""
    stage = TrainedStage(
        tmp_path / "retention", 2, stage={"checkpoints": {"every_steps": 3, "keep_last": 1, "keep_best": 0}}
    )
    shutil.copytree(half.folder, stage.folder)
    first = file_sha256(stage.weights / "checkpoints" / BEFORE / "manifest.json")
    later = stage.folder / "stages/later/weights/0a/identity.json"
    later.parent.mkdir(parents=True)
    later.write_text(json.dumps({"start": first}))
    train(half.folder.parent / "shared", stage)
    assert stage.ended == "finished" and stage.checkpoints == [BEFORE, "step-00000012"]
