"""Opens the checkpoint of an export job, after it has compared all files with the sizes and hashes in manifest.json."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from longhaul.artifacts.artifact_schemas import Checkpoint, TokenizerManifest
from longhaul.artifacts.atomic_files import file_blake3, file_sha256, read_json
from longhaul.artifacts.compare_hashes import read_tokenizer, wrong_files
from longhaul.artifacts.paths import WeightsFolder
from longhaul.config.field_types import HuggingFaceConfig
from longhaul.errors import InputError, UserError
from longhaul.export.tensor_blocks import HASHING_THREADS
from longhaul.jobs.kinds.export_job import ExportSpec
from longhaul.train.checkpoint.checkpoint_folders import MANIFEST, CheckpointManifest, read_manifest, reference_folder

ALTERED_HINT = (
    "the files were altered after training: restore them, or remove checkpoint.json and train again from an older one"
)


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint whose files have the stated hashes.

    folder:       DeepSpeed's tag folder
    model_config: content of the model's Hugging Face config.json
    generation_config: that of the pretrained model's generation_config.json; {} without one
    """

    checkpoint: Checkpoint
    tokenizer: TokenizerManifest
    folder: Path
    step: int
    manifest_sha256: str
    model_config: HuggingFaceConfig
    generation_config: HuggingFaceConfig

    @property
    def reference(self) -> Path:
        """Folder of the reference values that the trainer wrote with the checkpoint."""
        return reference_folder(self.folder)


def open_verified_checkpoint(job: ExportSpec) -> VerifiedCheckpoint:
    """Open the checkpoint that a job exports, and verify its files.

    Raises:
        UserError: the checkpoint is missing, incomplete, altered, without reference values, or trained with another
            tokenizer.
    """
    checkpoint = Checkpoint.read(Path(job.checkpoint))
    if job.which not in checkpoint.checkpoints:
        raise InputError(
            f"stage {job.stage} has no `{job.which}` checkpoint, only {', '.join(sorted(checkpoint.checkpoints))}",
            "set the stage's `export` to one of these; `best` needs a validation split",
        )
    chosen = checkpoint.checkpoints[job.which]
    weights = Path(checkpoint.weights)
    folder = weights / chosen["path"]
    _verify_files(folder, chosen["sha256"])
    tokenizer = read_tokenizer(Path(job.tokenizer))
    if tokenizer.hash != checkpoint.tokenizer_hash:
        raise UserError(
            f"{job.tokenizer} has hash {tokenizer.hash}, but stage {job.stage} was trained with {checkpoint.tokenizer_hash}",
            "train the stage again, or restore the tokenizer it was trained with",
        )
    if problem := next(wrong_files({weights / name: sha256 for name, sha256 in checkpoint.configs.items()}), None):
        raise UserError(problem, ALTERED_HINT)
    config = read_json(WeightsFolder(weights).model_config, ALTERED_HINT)
    generation = WeightsFolder(weights).generation_config
    settings = read_json(generation, ALTERED_HINT) if generation.is_file() else {}
    return VerifiedCheckpoint(checkpoint, tokenizer, folder, chosen["step"], chosen["sha256"], config, settings)


def _verify_files(folder: Path, manifest_sha256: str) -> None:
    """Raise UserError unless the manifest has the given hash and every file has the size and the hash in the manifest."""
    manifest = _read_manifest(folder / MANIFEST, manifest_sha256)
    if not manifest["has_reference_values"]:
        raise InputError(
            f"{folder} was saved without the reference values that an export needs",
            "set the stage's `export` to last; to export `best`, set it before the stage is trained",
        )
    files = manifest["files"]
    for name, stated in files.items():
        _verify_size(folder / name, stated["bytes"])
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        hashes = dict(zip(files, pool.map(lambda name: file_blake3(folder / name), files), strict=True))
    for name, stated in files.items():
        if hashes[name] != stated["blake3"]:
            raise UserError(
                f"{folder / name} has the BLAKE3 hash {hashes[name]}, but its manifest states {stated['blake3']}",
                ALTERED_HINT,
            )


def _read_manifest(path: Path, sha256: str) -> CheckpointManifest:
    if not path.exists():
        raise UserError(f"{path} does not exist, so the checkpoint is not complete", ALTERED_HINT)
    if (found := file_sha256(path)) != sha256:
        raise UserError(f"{path} has SHA-256 {found}, but checkpoint.json states {sha256}", ALTERED_HINT)
    return read_manifest(path.parent)


def _verify_size(path: Path, stated_bytes: int) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing", ALTERED_HINT)
    if (found := path.stat().st_size) != stated_bytes:
        raise UserError(f"{path} has {found} bytes, but its manifest states {stated_bytes}", ALTERED_HINT)
