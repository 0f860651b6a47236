"""Checkpoint folders on disk, without torch: which are whole, which are damaged, and what still points to one.

<weights>/checkpoints/step-00000100/    a whole checkpoint: its manifest.json names every file, with size and SHA-256
                      step-00000100.partial/   one that is being saved, or whose save was cut off
                      step-00000100.removed/   one that is being removed
                      step-00000100.corrupt/   one that was found damaged; only a person removes it

A checkpoint gets its name by one rename when all of it has reached the disk. So a listing tells what is whole even where a
node sees a folder late, a save of a step that is there replaces it only when the new one is whole, and what is half
written can be told from what was damaged later.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from longhaul.artifacts.files import file_sha256, read_json
from longhaul.artifacts.shared_file_system import appears, look_again

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8})")
_LEFTOVER = re.compile(r"step-\d{8}\.(partial|removed)")


def step_folder(weights: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return weights / "checkpoints" / f"step-{step:08d}"


def partial_folder(folder: Path) -> Path:
    """Where a checkpoint lies while it is saved."""
    return folder.with_name(f"{folder.name}.partial")


def step_folders(weights: Path) -> dict[int, Path]:
    """step -> folder of everything that has a checkpoint's name, whole or not."""
    found = {int(m[1]): path for path in weights.glob("checkpoints/step-*") if (m := _STEP.fullmatch(path.name))}
    return dict(sorted(found.items()))


def complete_checkpoints(weights: Path) -> dict[int, Path]:
    """step -> folder of every checkpoint whose manifest is there and whose files have the sizes it states."""
    return {step: folder for step, folder in step_folders(weights).items() if wrong_sizes(folder) is None}


def wrong_sizes(folder: Path) -> str | None:
    """The first file that is missing or has another size than the manifest states; None when there is none."""
    try:
        look_again(folder)
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, entry in files.items():
            if (found := _size(folder / name, entry["bytes"])) != entry["bytes"]:
                return f"{name} has {found} bytes, its manifest states {entry['bytes']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def _size(path: Path, stated_bytes: int) -> int:
    """A file's bytes; where they are not those that are stated, the server is asked, as NFS does when a file is opened."""
    with suppress(FileNotFoundError):
        if path.stat().st_size == stated_bytes:
            return stated_bytes
    appears(path)
    with path.open("rb") as stream:
        return os.fstat(stream.fileno()).st_size


def wrong_hashes(folder: Path, files: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """Of the given entries of a manifest, those whose bytes have not the stated SHA-256."""
    look_again(folder)  # another rank may have just renamed it
    for name, entry in files:
        try:
            if file_sha256(folder / name) != entry["sha256"]:
                yield f"{name} has not the hash that its manifest states"
        except OSError as error:
            yield f"{name} cannot be read: {error}"


def set_aside(folder: Path, reason: str) -> None:
    """Renames a damaged checkpoint to step-N.corrupt and says why; nothing of it is removed."""
    target = folder.with_name(f"{folder.name}.corrupt")
    for number in range(2, 1000):
        if not target.exists():
            break
        target = folder.with_name(f"{folder.name}.corrupt-{number}")
    folder.rename(target)
    print(f"warning: checkpoint {folder} is damaged: {reason}; it is passed over and kept as {target.name}", flush=True)


def publish(folder: Path) -> None:
    """Gives a saved checkpoint its name, over an older one of the same step."""
    partial = partial_folder(folder)
    for path in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        fsync(path)
    removed = _removed(folder) if folder.exists() else None
    partial.rename(folder)
    fsync(folder.parent)
    if removed:
        shutil.rmtree(removed, ignore_errors=True)


def remove(folder: Path) -> None:
    """Removes a checkpoint; it loses its name first, so that it never counts as a damaged one."""
    # What another node still holds open on NFS cannot go yet; clear_leftovers takes it later.
    shutil.rmtree(_removed(folder), ignore_errors=True)


def _removed(folder: Path) -> Path:
    target = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(target, ignore_errors=True)
    return folder.rename(target)


def clear_leftovers(weights: Path) -> None:
    """Removes saves and removals that were cut off."""
    for path in weights.glob("checkpoints/step-*"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def fsync(path: Path) -> None:
    """Has a file's bytes, or a folder's names, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pointed_to(weights_root: Path, checkpoint: Path) -> set[str]:
    """SHA-256 of every manifest that the stage's checkpoint.json, another stage's weights or an export names.

    weights_root is <root>/<stage>[/weights], beside which the other stages of the run have theirs.
    checkpoint is results/<run>/stages/<stage>/checkpoint.json.
    """
    stages = weights_root.parents[1] if weights_root.name == "weights" else weights_root.parent
    identities = [*stages.glob("*/weights/*/identity.json"), *stages.glob("*/*/identity.json")]
    found = {read_json(path).get("start") for path in identities}
    for path in checkpoint.parents[2].glob("export/*.json"):
        found.add(read_json(path).get("provenance", {}).get("checkpoint_sha256"))
    if checkpoint.exists():
        found |= {entry["sha256"] for entry in read_json(checkpoint)["checkpoints"].values()}
    return {sha256 for sha256 in found if sha256}
