"""Small corpora on disk, and jobs over them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from longhaul.artifacts.schemas import DataManifest, TokenizerManifest
from longhaul.config.dataset_config import Dataset
from longhaul.data.shards import tokenize_dataset as tokenize
from longhaul.data.tokenizers import build_tokenizer as tokenizer
from longhaul.jobs.specs import TokenizerSpec, TokenizeSpec

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
    """A document that differs from every other number's."""
    return f"Document {number}. " + " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words))


def conversation(number: int, turns: int = 1) -> list[dict[str, Any]]:
    """A system message and `turns` questions with their answers."""
    messages = [{"role": "system", "content": "Answer briefly."}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {number}.{turn}: {text(number, 3 + number % 5)}?"})
        messages.append({"role": "assistant", "content": f"Answer {number}.{turn}. {text(number, 5 + number % 9)}"})
    return messages


def write_jsonl(path: Path, column: str, values: Iterable[Any]) -> Path:
    """One {column: value} a line."""
    lines = (json.dumps({column: value}, ensure_ascii=False) for value in values)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def dataset(kind: str = "text", **settings: Any) -> Dataset:
    """Its `files` only satisfy the config model: jobs are given resolved files."""
    return Dataset.model_validate({"kind": kind, "files": ("unused",), **settings})


def tokenizer_job(folder: Path, files: Sequence[Path] = (), **settings: Any) -> TokenizerSpec:
    """Trains on text files unless told otherwise."""
    named = {"corpus": tuple(map(str, files))} if files else {}
    defaults: dict[str, Any] = {
        "path": None,
        "train_vocab_size": 400,
        "chat_template": None,
        "needs_chat_template": True,
        "model_vocab_size": None,
    }
    return TokenizerSpec(
        run="test",
        train_files=named,
        train_datasets={name: dataset() for name in named},
        folder=str(folder / "tokenizers"),
        out=str(folder / "tokenizer.json"),
        **{**defaults, **settings},
    )


def make_tokenizer(folder: Path, files: Sequence[Path] = (), **settings: Any) -> TokenizerManifest:
    """Runs a tokenizer job and reads what it made."""
    job = tokenizer_job(folder, files, **settings)
    tokenizer.run(job)
    return TokenizerManifest.read(Path(job.out))


def tokenize_job(
    folder: Path,
    tokenizer_folder: Path,
    files: Sequence[Path],
    settings: Dataset,
    workers: int = 1,
    evaluation: Sequence[Path] = (),
) -> TokenizeSpec:
    """Tokenizes files into <folder>/data."""
    return TokenizeSpec(
        run="test",
        name="corpus",
        evaluation=tuple(map(str, evaluation)),
        parts={},
        dataset=settings,
        files=tuple(map(str, files)),
        tokenizer=str(tokenizer_folder / "tokenizer.json"),
        workers=workers,
        survey=None,
        folder=str(folder / "data"),
        out=str(folder / "data.json"),
    )


def make_shards(folder: Path, *arguments: Any, **options: Any) -> DataManifest:
    """Runs a tokenize job, whose arguments these are, and reads what it made."""
    job = tokenize_job(folder, *arguments, **options)
    tokenize.run(job)
    return DataManifest.read(Path(job.out))
