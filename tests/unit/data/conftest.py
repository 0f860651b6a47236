"""One trained tokenizer, one text and one chat dataset for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.artifacts.artifact_schemas import DataManifest
from tests.support.corpora import conversation, dataset, make_shards, make_tokenizer, text, write_jsonl


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tokenizer.json, the manifest of a tokenizer of 400 tokens with longhaul's chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = write_jsonl(folder / "corpus.jsonl", "text", (text(i) for i in range(200)))
    make_tokenizer(folder, [corpus])
    return folder


@pytest.fixture(scope="session")
def text_shards(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DataManifest:
    """Return the manifest of 300 texts, a tenth of them for validation."""
    folder = tmp_path_factory.mktemp("text")
    corpus = write_jsonl(folder / "corpus.jsonl", "text", (text(i, 5 + i % 60) for i in range(300)))
    return make_shards(folder, tokenizer_folder, [corpus], dataset(validation_fraction=0.1))


@pytest.fixture(scope="session")
def chat_shards(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DataManifest:
    """Return the manifest of 200 conversations of one to three turns, a tenth of them for validation."""
    folder = tmp_path_factory.mktemp("chat")
    corpus = write_jsonl(folder / "corpus.jsonl", "messages", (conversation(i, 1 + i % 3) for i in range(200)))
    return make_shards(folder, tokenizer_folder, [corpus], dataset("chat", validation_fraction=0.1))
