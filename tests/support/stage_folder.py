"""A finished stage on disk, copied from a training of train_zero_checkpoints.py, and the job that exports it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longhaul.artifacts.artifact_schemas import Checkpoint, TokenizerManifest
from longhaul.artifacts.atomic_files import file_sha256
from longhaul.artifacts.paths import WeightsFolder
from longhaul.jobs.kinds.export_job import ExportSpec
from longhaul.train.checkpoint.checkpoint_folders import reference_folder
from tests.support.train_zero_checkpoints import STEPS, TAG, write_manifest

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ExportableStage:
    """`root` is the working folder, `tag` the checkpoint's folder, `job` the job that exports it."""

    root: Path
    tag: Path
    job: ExportSpec

    @property
    def reference(self) -> Path:
        """Folder of the reference values that the training wrote."""
        return reference_folder(self.tag)

    def update_manifest(self, has_reference_values: bool = True) -> None:
        """Write the manifest and checkpoint.json again, for files that a test has altered."""
        write_manifest(self.tag)
        path = self.tag / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"has_reference_values": has_reference_values}))
        _write_checkpoint(self.root, self.tag, hashlib.sha256(path.read_bytes()).hexdigest())


def create_exportable_stage(
    trained: Path,
    root: Path,
    dtype: str = "bf16",
    chat: bool = False,
    copy: Callable[[str, str], object] = shutil.copy2,
) -> ExportableStage:
    """Copy the training's weights folder to `root` and add checkpoint.json, the tokenizer and the job.

    copy: copies one file; os.link for large files that no test alters
    """
    weights = root / "stages/main/weights/0123"
    shutil.copytree(trained / "weights", weights, copy_function=copy)
    write_tokenizer(root / "tokenizer")
    tokenizer = TokenizerManifest(
        path=str(root / "tokenizer"),
        hash="t0",
        vocab_size=259,
        bos_id=0,
        eos_id=1,
        pad_id=2,
        has_chat_template=True,
        files={path.name: file_sha256(path) for path in (root / "tokenizer").iterdir()},
    )
    tokenizer.write(root / "tokenizer.json")
    tag = weights / "checkpoints" / TAG
    _write_checkpoint(root, tag, hashlib.sha256((tag / "manifest.json").read_bytes()).hexdigest())
    return ExportableStage(root, tag, _job(root, dtype, chat))


def _job(root: Path, dtype: str, chat: bool) -> ExportSpec:
    return ExportSpec(
        run="unit",
        stage="main",
        checkpoint=str(root / "stages/main/checkpoint.json"),
        which="last",
        dtype=dtype,
        tokenizer=str(root / "tokenizer.json"),
        config_hash="c0",
        pretrained_changes=(),
        chat=chat,
        folder=str(root / "export/main"),
        out=str(root / "export/main.json"),
    )


def _write_checkpoint(root: Path, tag: Path, manifest_sha256: str) -> None:
    entry = {"step": STEPS, "path": f"checkpoints/{TAG}", "sha256": manifest_sha256, "validation_loss": None}
    Checkpoint(
        run="unit",
        stage="main",
        weights=str(tag.parents[1]),
        spec={"model": {"model_type": "llama"}, "kind": "sft", "dataset": "chats", "from": None},
        checkpoints={"last": entry},
        steps=STEPS,
        data_hash="d0",
        tokenizer_hash="t0",
        configs={path.name: file_sha256(path) for path in WeightsFolder(tag.parents[1]).exported_configs()},
    ).write(root / "stages/main/checkpoint.json")


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of all bytes and three special tokens."""
    vocabulary = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )
    wrapped.save_pretrained(folder)
