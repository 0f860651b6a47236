"""A finished stage on disk, made from a training of zero_training.py, and the job that exports it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longhaul.artifacts.schemas import Checkpoint, TokenizerManifest
from longhaul.jobs.specs import ExportSpec
from tests.support.zero_training import STEPS, TAG, write_manifest

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """`root` is the working folder; `tag` the checkpoint's folder; `job` exports it."""

    root: Path
    tag: Path
    job: ExportSpec

    def seal(self) -> None:
        """Makes manifest and checkpoint.json agree with files that a test has altered."""
        _write_checkpoint(self.root, self.tag, write_manifest(self.tag))


def make_stage(
    trained: Path,
    root: Path,
    dtype: str = "bf16",
    chat: bool = False,
    copy: Callable[[str, str], object] = shutil.copy2,
) -> Stage:
    """Copies the training's weights folder to `root` and adds checkpoint.json, the tokenizer and the job.

    copy: a file; os.link where it is large and no test alters it
    """
    weights = root / "stages/main/weights/0123"
    shutil.copytree(trained / "weights", weights, copy_function=copy)
    _write_tokenizer(root / "tokenizer")
    tokenizer = TokenizerManifest(
        path=str(root / "tokenizer"),
        hash="t0",
        vocab_size=259,
        bos_id=0,
        eos_id=1,
        pad_id=2,
        has_chat_template=True,
    )
    tokenizer.write(root / "tokenizer.json")
    tag = weights / "checkpoints" / TAG
    _write_checkpoint(root, tag, hashlib.sha256((tag / "manifest.json").read_bytes()).hexdigest())
    return Stage(root, tag, _job(root, dtype, chat))


def _job(root: Path, dtype: str, chat: bool) -> ExportSpec:
    return ExportSpec(
        run="unit",
        stage="main",
        checkpoint=str(root / "stages/main/checkpoint.json"),
        which="last",
        dtype=dtype,
        tokenizer=str(root / "tokenizer.json"),
        config_hash="c0",
        first_weights=(),
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
    ).write(root / "stages/main/checkpoint.json")


def _write_tokenizer(folder: Path) -> None:
    """Bytes and three special tokens."""
    vocabulary = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )
    wrapped.save_pretrained(folder)
