"""Checkpoints that were damaged, cut short, or did not fit on the disk: the last whole one is used, nothing is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from longhaul.artifacts.files import file_sha256
from longhaul.train.checkpoint import folders as store
from tests.parity.parity_table import make_data
from tests.recovery.trained_stages import Leg, train

NEWEST, BEFORE = "step-00000006", "step-00000003"
OPTIMIZER = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def flip(folder: Path) -> None:
    path = folder / OPTIMIZER
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(folder: Path) -> None:
    path = folder / OPTIMIZER
    path.write_bytes(path.read_bytes()[:-100])


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def half_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:80])


def without_a_file(folder: Path) -> None:
    (folder / OPTIMIZER).unlink()


def half_saved(folder: Path) -> None:
    without_manifest(folder)
    folder.rename(store.partial_folder(folder))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit": (flip, f"{OPTIMIZER} has not the hash that its manifest states"),
    "size": (cut, f"{OPTIMIZER} has "),
    "no manifest": (without_manifest, "manifest.json is missing"),
    "half a manifest": (half_manifest, "manifest.json cannot be read"),
    "no file": (without_a_file, f"{OPTIMIZER} is missing"),
    "half saved": (half_saved, ""),
}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Leg:
    folder = tmp_path_factory.mktemp("trust")
    leg = Leg(folder / "half", 2, befalls={"stop_after": 7}, stage={"export": "last"})
    train(make_data(folder / "shared"), leg)
    return leg


@pytest.fixture(scope="module")
def resumed(half: Leg) -> tuple[dict[str, Leg], str]:
    folder, legs = half.folder.parent, {}
    for name in ("undisturbed", *DAMAGES, "other weights"):
        legs[name] = Leg(folder / name, 2, stage={"export": "last"})
        shutil.copytree(half.folder, legs[name].folder)
        if name in DAMAGES:
            DAMAGES[name][0](legs[name].weights / "checkpoints" / NEWEST)
    manifest = legs["other weights"].weights / "checkpoints" / NEWEST / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"weights": "0123456789abcdef"}))
    return legs, train(folder / "shared", *legs.values())


@pytest.mark.parametrize("name", DAMAGES)
def test_the_last_whole_checkpoint_is_used(resumed: tuple[dict[str, Leg], str], name: str):
    leg, reason = resumed[0][name], DAMAGES[name][1]
    assert leg.ended == "finished"
    assert [event["step"] for event in leg.events("resumed")] == [3]
    assert leg.masters() == resumed[0]["undisturbed"].masters()
    assert [event["reason"].startswith(reason) for event in leg.events("checkpoint_damaged")] == [True] * bool(reason)
    assert (f"{NEWEST}.corrupt" in leg.checkpoints) == bool(reason)
    assert not any(name.endswith(("partial", "removed")) for name in leg.checkpoints)
    if reason:
        assert f"{leg.weights / 'checkpoints' / NEWEST} is damaged: {reason}".split("/stages/")[1] in resumed[1]


def test_a_checkpoint_of_other_weights_is_refused(resumed: tuple[dict[str, Leg], str]):
    leg = resumed[0]["other weights"]
    assert f"{NEWEST} belongs to the weights 0123456789abcdef" in leg.ended
    assert leg.checkpoints == [BEFORE, NEWEST]


def test_every_file_is_in_the_manifest_with_its_hash(half: Leg):
    """They were taken while the files were written."""
    folder = half.weights / "checkpoints" / NEWEST
    stated = json.loads((folder / "manifest.json").read_text())["files"]
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(stated) == found and len(found) == 6
    for name, entry in stated.items():
        assert entry == {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}


def test_a_full_disk_loses_nothing(half: Leg, tmp_path: Path):
    """On a file system with room for two checkpoints, and not for three."""
    size = sum(path.stat().st_size for path in (half.weights / "checkpoints" / NEWEST).iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    leg = Leg(disk, 2)
    mount = f"mount -t tmpfs -o size={int(2.6 * size)} none {disk}"
    output = train(
        half.folder.parent / "shared", leg, before=["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    )
    assert leg.checkpoints == [BEFORE, NEWEST], output[-3000:]
    assert leg.ended.startswith("DiskFull: a checkpoint needs ")
    needed = int(leg.ended.split(" needs ")[1].split(" bytes")[0])
    assert needed == pytest.approx(size, rel=0.02)
    assert f"no room in {leg.folder}/stages/main/weights/" in leg.ended
    assert "bytes (0.00 GiB) are free" in leg.ended


def test_what_is_pointed_to_stays(half: Leg, tmp_path: Path):
    """By the stage's own checkpoint.json, by the identity of weights that began with it, by an export."""
    run = tmp_path / "results/run"
    own = run / "stages/main"
    for path, value in {
        own / "checkpoint.json": {"checkpoints": {"last": {"sha256": "a"}, "best": {"sha256": "b"}}},
        run / "stages/chat/weights/01/identity.json": {"start": "c"},
        run / "stages/tune/weights/02/identity.json": {"start": None},
        run / "export/main.json": {"provenance": {"checkpoint_sha256": "d"}},
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    assert store.pointed_to(own / "weights", own / "checkpoint.json") == {"a", "b", "c", "d"}
    elsewhere = tmp_path / "big/run/chat/03/identity.json"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text(json.dumps({"start": "e"}))
    assert store.pointed_to(tmp_path / "big/run/main", own / "checkpoint.json") == {"a", "b", "d", "e"}


def test_thinning_keeps_what_is_pointed_to(half: Leg, tmp_path: Path):
    """A stage that goes on keeps the one checkpoint that another stage began with."""
    leg = Leg(tmp_path / "thin", 2, stage={"checkpoints": {"every_steps": 3, "keep_last": 1, "keep_best": 0}})
    shutil.copytree(half.folder, leg.folder)
    first = file_sha256(leg.weights / "checkpoints" / BEFORE / "manifest.json")
    later = leg.folder / "stages/later/weights/0a/identity.json"
    later.parent.mkdir(parents=True)
    later.write_text(json.dumps({"start": first}))
    train(half.folder.parent / "shared", leg)
    assert leg.ended == "finished" and leg.checkpoints == [BEFORE, "step-00000012"]
