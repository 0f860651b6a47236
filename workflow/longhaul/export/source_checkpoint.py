"""The checkpoint that is exported, verified before anything of it is used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longhaul.artifacts.files import file_sha256, read_json
from longhaul.artifacts.schemas import Checkpoint, TokenizerManifest
from longhaul.errors import UserError
from longhaul.jobs.specs import ExportSpec

HASHING_THREADS = 4
ANOTHER = (
    "the files were altered after training: restore them, or remove checkpoint.json and train again from an older one"
)


@dataclass(frozen=True)
class Source:
    """A verified checkpoint: `folder` is DeepSpeed's tag folder, `model_config` the Hugging Face config."""

    checkpoint: Checkpoint
    tokenizer: TokenizerManifest
    folder: Path
    step: int
    manifest_sha256: str
    model_config: dict[str, Any]


def open_source(job: ExportSpec) -> Source:
    """Reads and verifies the checkpoint that a job exports.

    Raises:
        UserError: the checkpoint is missing, incomplete, altered, without proof, or made with another tokenizer.
    """
    checkpoint = Checkpoint.read(Path(job.checkpoint))
    if job.which not in checkpoint.checkpoints:
        raise UserError(
            f"stage {job.stage} has no `{job.which}` checkpoint, only {', '.join(sorted(checkpoint.checkpoints))}",
            "set the stage's `export` to one of these; `best` needs a validation split",
        )
    chosen = checkpoint.checkpoints[job.which]
    folder = Path(checkpoint.weights) / chosen["path"]
    _verify(folder, chosen["sha256"])
    tokenizer = TokenizerManifest.read(Path(job.tokenizer))
    if tokenizer.hash != checkpoint.tokenizer_hash:
        raise UserError(
            f"{job.tokenizer} has hash {tokenizer.hash}, but stage {job.stage} was trained with {checkpoint.tokenizer_hash}",
            "train the stage again, or restore the tokenizer it was trained with",
        )
    config = read_json(Path(checkpoint.weights) / "model_config.json")
    return Source(checkpoint, tokenizer, folder, chosen["step"], chosen["sha256"], config)


def _verify(folder: Path, manifest_sha256: str) -> None:
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{path} does not exist, so the checkpoint is not complete", ANOTHER)
    if (found := file_sha256(path)) != manifest_sha256:
        raise UserError(f"{path} has SHA-256 {found}, but checkpoint.json says {manifest_sha256}", ANOTHER)
    manifest = read_json(path)
    if not manifest["exportable"]:
        raise UserError(
            f"{folder} was saved without the proof an export needs", "set the stage's `export` before it is trained"
        )
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, wanted in files.items():
        _verify_size(folder / name, wanted["bytes"])
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        hashes = dict(zip(files, pool.map(lambda name: file_sha256(folder / name), files), strict=True))
    for name, wanted in files.items():
        if hashes[name] != wanted["sha256"]:
            raise UserError(
                f"{folder / name} has SHA-256 {hashes[name]}, but the manifest says {wanted['sha256']}", ANOTHER
            )


def _verify_size(path: Path, wanted_bytes: int) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing", ANOTHER)
    if path.stat().st_size != wanted_bytes:
        raise UserError(f"{path} has {path.stat().st_size} bytes, but the manifest says {wanted_bytes}", ANOTHER)
