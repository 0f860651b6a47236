"""States of a checkpoint folder on disk (complete, .partial, .corrupt): manifest.json, publishing, removal of interrupted saves.

<weights>/checkpoints/step-00000100/            a complete checkpoint: manifest.json lists every file with size and BLAKE3 hash
                      step-00000100.partial/    a save that runs, or that was interrupted
                      step-00000100.removed/    a checkpoint that is being removed
                      step-00000100.corrupt/    a damaged checkpoint; longhaul never removes it

A checkpoint gets its final name by one rename, after all of it has reached the disk. This has three effects. A listing shows
what is complete, even where a node sees a folder late. A repeated save of a step replaces the earlier one only when it is
complete. An interrupted save cannot be mistaken for a checkpoint that was damaged later.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, FiniteFloat
from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import Checkpoint, Count, Export
from longhaul.artifacts.atomic_files import file_blake3
from longhaul.artifacts.paths import WeightsFolder, run_of
from longhaul.artifacts.shared_file_system import exists_on_server, refresh_listing
from longhaul.artifacts.typed_json import Blake3, read_typed_json
from longhaul.errors import InputError, UserError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
"""Version of manifest.json. A manifest without it, as release 0.2.0 wrote them, counts as damaged."""
_STEP = re.compile(r"step-(\d{8})")
_USE_ANOTHER = "use another checkpoint"
_RESTORE = "restore the file, or move its weights folder away"
MOVE_AWAY = "the folder was copied or edited: move it away, and the stage is trained in its place"
"""The remedy for a weights folder that holds other weights than its name says."""
_LEFTOVER = re.compile(r"step-\d{8}\.(partial|removed)")


class ManifestFile(TypedDict):
    """One file of a checkpoint."""

    bytes: Count
    blake3: Blake3


class _ManifestVersion(TypedDict):
    """The key by which releases tell their manifests from those of others."""

    schema_version: Count


class CheckpointManifest(TypedDict):
    """manifest.json of a checkpoint. files: name in the folder -> size and hash."""

    schema_version: Count
    files: dict[str, ManifestFile]
    step: Count
    validation_loss: float | None
    has_reference_values: bool
    weights: NotRequired[str]
    world_size: Count
    zero_stage: Count
    offload_optimizer: str
    parallel: dict[str, int]


class WeightsIdentity(TypedDict):
    """identity.json of a weights folder, as far as it is computed with. start: SHA-256 of a checkpoint's manifest."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    start: NotRequired[str | None]
    steps: NotRequired[Count]
    epochs: NotRequired[FiniteFloat]


class OtherReleaseError(InputError):
    """Another release saved a checkpoint. It is not damaged, but this release cannot read it."""

    failure_class = "environment"  # not permanent: the release that saved it runs the same job


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read a checkpoint's manifest.json.

    Raises:
        OtherReleaseError: it has another schema version.
        UserError: it is missing or invalid.
    """
    path = folder / MANIFEST
    if (found := read_typed_json(path, _ManifestVersion, _USE_ANOTHER)["schema_version"]) != SCHEMA_VERSION:
        raise OtherReleaseError(
            f"{path} has schema version {found}, this release of longhaul reads version {SCHEMA_VERSION}",
            "finish the run with the release that saved it, or change `run` in the config: then all stages are trained again",
        )
    return read_typed_json(path, CheckpointManifest, _USE_ANOTHER)


def step_folder(weights: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return WeightsFolder(weights).checkpoint(step)


def reference_folder(checkpoint: Path) -> Path:
    """Return the folder of the reference values in a checkpoint."""
    return checkpoint / "reference"


def partial_folder(folder: Path) -> Path:
    """Return the folder that holds a checkpoint while it is saved."""
    return folder.with_name(f"{folder.name}.partial")


def step_folders(weights: Path) -> dict[int, Path]:
    """Return step -> folder of everything that has a checkpoint's name, complete or not; in the order of the steps."""
    paths = WeightsFolder(weights).checkpoints.glob("step-*")
    return dict(sorted((int(match[1]), path) for path in paths if (match := _STEP.fullmatch(path.name))))


def complete_checkpoints(weights: Path) -> dict[int, Path]:
    """Return step -> folder of every checkpoint that has a manifest and whose files have the sizes listed there.

    Raises:
        OtherReleaseError: another release saved a checkpoint.
    """
    return {step: folder for step, folder in step_folders(weights).items() if wrong_sizes(folder) is None}


def wrong_sizes(folder: Path) -> str | None:
    """Return what is wrong with the first file that is missing or has a size other than the manifest's; None if all are right.

    Raises:
        OtherReleaseError: another release saved the checkpoint.
    """
    try:
        refresh_listing(folder)
        for name, entry in read_manifest(folder)["files"].items():
            if (found := _size(folder / name, entry["bytes"])) != entry["bytes"]:
                return f"{name} has {found} bytes, the manifest says {entry['bytes']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except OtherReleaseError:
        raise
    except UserError as error:
        is_missing = not (folder / MANIFEST).exists()
        return f"{MANIFEST} is missing" if is_missing else f"{MANIFEST} cannot be read: {error.message}"
    except (OSError, ValueError) as error:  # a name with a null byte
        return f"a file of the manifest cannot be read: {error}"
    return None


def _size(path: Path, manifest_bytes: int) -> int:
    """Return a file's size. Where it is not the manifest's, open the file: NFS asks its server for the size only then.

    A pipe is not opened, which waits for a writer.
    """
    with suppress(FileNotFoundError):
        found = path.stat()
        if found.st_size == manifest_bytes or stat.S_ISFIFO(found.st_mode):
            return found.st_size
    exists_on_server(path)
    with path.open("rb") as stream:
        return os.fstat(stream.fileno()).st_size


def wrong_hashes(folder: Path, files: Iterable[tuple[str, ManifestFile]]) -> Iterator[str]:
    """Yield what is wrong with each of the given manifest entries whose file cannot be read or has another hash."""
    refresh_listing(folder)  # another rank may have renamed it a moment ago
    for name, entry in files:
        try:
            if file_blake3(folder / name) != entry["blake3"]:
                yield f"{name} does not have the hash of the manifest"
        except OSError as error:
            yield f"{name} cannot be read: {error}"
        except UserError as error:
            yield error.message


def set_aside(folder: Path, reason: str) -> None:
    """Rename a damaged checkpoint to step-N.corrupt and print the reason; nothing of it is removed."""
    target = folder.with_name(f"{folder.name}.corrupt")
    for number in range(2, 1000):
        if not target.exists():
            break
        target = folder.with_name(f"{folder.name}.corrupt-{number}")
    folder.rename(target)
    print(f"warning: checkpoint {folder} is damaged: {reason}; it is not used, and kept as {target.name}", flush=True)


def publish(folder: Path) -> None:
    """Give a saved checkpoint its final name; an older one of the same step is replaced."""
    partial = partial_folder(folder)
    for path in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        fsync(path)
    removed = _removed(folder) if folder.exists() else None
    partial.rename(folder)
    fsync(folder.parent)
    if removed:
        shutil.rmtree(removed, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that it never counts as a damaged one."""
    # NFS keeps files that another node has open; clear_leftovers removes them later.
    shutil.rmtree(_removed(folder), ignore_errors=True)


def _removed(folder: Path) -> Path:
    """Rename a checkpoint to step-N.removed and return the new path."""
    target = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(target, ignore_errors=True)
    return folder.rename(target)


def clear_leftovers(weights: Path) -> None:
    """Finish removals and remove saves that were interrupted."""
    for path in WeightsFolder(weights).checkpoints.glob("step-*"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def referenced_checkpoints(weights_root: Path, checkpoint: Path) -> set[str]:
    """Return the SHA-256 of every manifest that the stage's checkpoint.json, another stage's weights or an export names.

    weights_root: <root>/<stage>[/weights]; the other stages of the run have theirs beside it
    checkpoint:   results/<run>/stages/<stage>/checkpoint.json

    Raises:
        UserError: one of these files is invalid, so its reference is not known.
    """
    stages = weights_root.parents[1] if weights_root.name == "weights" else weights_root.parent
    identities = [*stages.glob("*/weights/*/identity.json"), *stages.glob("*/*/identity.json")]
    found: set[Any] = {read_typed_json(path, WeightsIdentity, _RESTORE).get("start") for path in identities}
    for path in run_of(checkpoint.parent).export_manifests():
        found.add(Export.read(path).provenance.get("checkpoint_sha256"))
    if checkpoint.exists():
        found |= {entry["sha256"] for entry in Checkpoint.read(checkpoint).checkpoints.values()}
    return {sha256 for sha256 in found if sha256}
