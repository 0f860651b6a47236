"""Writes small corpora, and runs tokenizer and tokenize jobs on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from longhaul.artifacts.artifact_schemas import DataManifest, TokenizerManifest
from longhaul.config.dataset_config import Dataset
from longhaul.data.shards import tokenize_dataset
from longhaul.data.tokenizers import build_tokenizer
from longhaul.jobs.kinds.tokenize_jobs import TokenizeSpec
from longhaul.jobs.kinds.tokenizer_job import TokenizerSpec

WORDS = [
    "the",
    "ship",
    "sails",
    "on",
    "a",
    "long",
    "haul",
    "over",
    "calm",
    "water",
    "while",
    "old",
    "stars",
    "turn",
    "and",
    "Σ",
    "naïve",
    "北京",
    "🚢",
    "says",
    "12",
    "+",
    "30",
    "=",
    "42",
]


def text(number: int, words: int = 40) -> str:
    """Return a document that is different for every number."""
    return f"Document {number}. " + " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words))


def conversation(number: int, turns: int = 1) -> list[dict[str, Any]]:
    """Return a conversation: a system message, then `turns` questions and answers."""
    messages = [{"role": "system", "content": "Answer briefly."}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {number}.{turn}: {text(number, 3 + number % 5)}?"})
        messages.append({"role": "assistant", "content": f"Answer {number}.{turn}. {text(number, 5 + number % 9)}"})
    return messages


def write_jsonl(path: Path, column: str, values: Iterable[Any]) -> Path:
    """Write one JSON object {column: value} per line."""
    lines = (json.dumps({column: value}, ensure_ascii=False) for value in values)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def dataset(kind: str = "text", **settings: Any) -> Dataset:
    """Return a dataset config. Its `files` only satisfy the config model: jobs get resolved files."""
    return Dataset.model_validate({"kind": kind, "files": ("unused",), **settings})


def tokenizer_job(folder: Path, files: Sequence[Path] = (), **settings: Any) -> TokenizerSpec:
    """Return a job that trains a tokenizer on text files, unless the settings change it."""
    train_files = {"corpus": tuple(map(str, files))} if files else {}
    defaults: dict[str, Any] = {
        "path": None,
        "train_vocab_size": 400,
        "chat_template": None,
        "needs_chat_template": True,
        "model_vocab_size": None,
    }
    return TokenizerSpec(
        run="test",
        train_files=train_files,
        train_datasets={name: dataset() for name in train_files},
        folder=str(folder / "tokenizers"),
        out=str(folder / "tokenizer.json"),
        **{**defaults, **settings},
    )


def make_tokenizer(folder: Path, files: Sequence[Path] = (), **settings: Any) -> TokenizerManifest:
    """Run a tokenizer job and return its manifest."""
    job = tokenizer_job(folder, files, **settings)
    build_tokenizer.run(job)
    return TokenizerManifest.read(Path(job.out))


def tokenize_job(
    folder: Path,
    tokenizer_folder: Path,
    files: Sequence[Path],
    settings: Dataset,
    workers: int = 1,
    evaluation: Sequence[Path] = (),
) -> TokenizeSpec:
    """Return a job that writes the shards of files to <folder>/data and the manifest to <folder>/data.json."""
    return TokenizeSpec(
        run="test",
        name="corpus",
        evaluation=tuple(map(str, evaluation)),
        parts={},
        dataset=settings,
        files=tuple(map(str, files)),
        tokenizer=str(tokenizer_folder / "tokenizer.json"),
        workers=workers,
        source_index=None,
        folder=str(folder / "data"),
        out=str(folder / "data.json"),
    )


def make_shards(folder: Path, *arguments: Any, **options: Any) -> DataManifest:
    """Run a tokenize job with these arguments and return its manifest."""
    job = tokenize_job(folder, *arguments, **options)
    tokenize_dataset.run(job)
    return DataManifest.read(Path(job.out))
