"""Excerpts and ids of encoded documents are compared with the reference; chats are encoded with masks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.data.readers.read_documents import Document
from longhaul.data.shards.shard_reader import SplitReader
from longhaul.data.tokenizers.document_encoder import DocumentEncoder
from longhaul.data.tokenizers.reference_and_fast_encoder import FastEncoder
from longhaul.data.tokenizers.token_rows import TokenRows
from longhaul.errors import UserError
from tests.support.corpora import dataset, make_shards, text, write_jsonl


def test_an_id_outside_the_vocabulary_rejects_the_fast_encoder(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """The id does not fit into uint16, where it would become another token. No excerpt of that document is compared."""
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", (text(i) for i in range(300)))
    expected = make_shards(tmp_path / "a", tokenizer_folder, [corpus], dataset())
    encode = FastEncoder.encode

    def beyond(self: FastEncoder, texts: list[str]) -> TokenRows:
        rows = encode(self, texts)
        return TokenRows(rows.tokens + np.uint32(1 << 16) * (len(texts) == 300), rows.lengths)

    monkeypatch.setattr(FastEncoder, "encode", beyond)
    manifest = make_shards(tmp_path / "b", tokenizer_folder, [corpus], dataset())
    assert manifest.encoder["name"] == "tokenizers"
    assert re.fullmatch(r"gigatoken gives id \d+ of a vocabulary of \d+", manifest.encoder["reason"])
    for split, entry in expected.splits.items():
        assert [s["sha256"] for s in manifest.splits[split]["shards"]] == [s["sha256"] for s in entry["shards"]]


def test_the_first_excerpts_of_a_chunk_are_twice_as_long(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch):
    manifest = TokenizerManifest.read(tokenizer_folder / "tokenizer.json")
    encoder = DocumentEncoder(manifest, dataset(), "gigatoken")
    compared: list[list[str]] = []
    monkeypatch.setattr(
        "longhaul.data.tokenizers.document_encoder.first_difference",
        lambda fast, reference, excerpts: compared.append(excerpts),
    )
    documents = [Document("word " * 1000, "here", 0)] * 10
    for _ in range(2):
        encoder.encode(documents)
        encoder.encode(documents)
        encoder.check()
    assert [[len(excerpt) for excerpt in excerpts] for excerpts in compared] == 2 * [[500] * 4 + [250] * 4]


REASONING = "<think>First 40, then 2.</think>It is 42."


@pytest.mark.parametrize("in_loss", [True, False])
def test_reasoning_counts_in_the_loss_as_configured(tmp_path: Path, tokenizer_folder: Path, in_loss: bool):
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": REASONING}] for i in range(3)]
    corpus = write_jsonl(tmp_path / "a.jsonl", "messages", chats)
    manifest = make_shards(
        tmp_path, tokenizer_folder, [corpus], dataset("chat", reasoning_in_loss=in_loss, validation_fraction=0)
    )
    tokens, mask = SplitReader(Path(manifest.path), manifest.splits["train"], with_mask=True).document(0)
    tokenizer = AutoTokenizer.from_pretrained(TokenizerManifest.read(tokenizer_folder / "tokenizer.json").path)
    trained_on = tokenizer.decode(tokens[mask == 1])
    assert "It is 42." in trained_on and ("First 40" in trained_on) == in_loss
    assert "First 40" in tokenizer.decode(tokens)


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_only_the_completion_of_a_prompt_with_answers_is_in_the_loss(
    tmp_path: Path, tokenizer_folder: Path, column: str
):
    """In `messages`, all three answers are."""
    answer = {"role": "assistant", "content": "A"}
    prompt = [{"role": "user", "content": "Q"}, answer, {"role": "user", "content": "Q"}, answer]
    row = {"prompt": prompt, "completion": [{"role": "user", "content": "Q"}, answer]}
    row["messages"] = row["prompt"] + row["completion"]
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    columns = {"messages": "messages"} if column == "messages" else {"prompt": "prompt", "completion": "completion"}
    settings = dataset("chat", columns=columns, validation_fraction=0)
    manifest = make_shards(tmp_path, tokenizer_folder, [tmp_path / "a.jsonl"], settings)
    one_answer = {"messages": 3, "prompt": 1}[column]
    assert manifest.splits["train"]["loss_tokens"] == one_answer * 2, "A and EOS"


def test_prompt_and_completion_become_a_conversation(tmp_path: Path, tokenizer_folder: Path):
    lines = [json.dumps({"p": f"Q{i}", "c": "A"}) for i in range(3)] + [
        '{"p": [{"role": "user", "content": "Q"}], "c": "A"}'
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    columns = {"prompt": "p", "completion": "c"}
    manifest = make_shards(
        tmp_path, tokenizer_folder, [tmp_path / "a.jsonl"], dataset("chat", columns=columns, validation_fraction=0)
    )
    assert manifest.splits["train"]["documents"] == 4 and manifest.splits["train"]["loss_tokens"] >= 8
    with pytest.raises(UserError, match=r"a.jsonl:1: no column 'x'"):
        bad = dataset("chat", columns={"prompt": "p", "completion": "x"})
        make_shards(tmp_path / "b", tokenizer_folder, [tmp_path / "a.jsonl"], bad)
