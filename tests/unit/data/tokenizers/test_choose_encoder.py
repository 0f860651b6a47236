"""The fast encoder is used where it gives the reference's ids, and only there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.data.tokenizers import choose_encoder
from longhaul.data.tokenizers.choose_encoder import EncoderChoice, encode_stress_corpus
from longhaul.data.tokenizers.reference_and_fast_encoder import FastEncoder, ReferenceEncoder
from longhaul.data.tokenizers.token_rows import TokenRows
from tests.support.corpora import dataset, make_shards, text, write_jsonl


def folder_of(manifest_folder: Path) -> Path:
    """Return the tokenizer folder of a manifest."""
    return Path(TokenizerManifest.read(manifest_folder / "tokenizer.json").path)


def save(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def bpe(folder: Path, **parts: Any) -> Path:
    """Train a byte-level BPE with other parts, such as a normalizer, and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(i) for i in range(100)], trainer)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return save(folder, tokenizer)


def choose(folder: Path, sample: Sequence[str] = ()) -> EncoderChoice:
    return choose_encoder.choose_encoder(folder, list(encode_stress_corpus(folder)), sample)


def test_the_fast_encoder_is_chosen_for_the_runs_own_tokenizer(tokenizer_folder: Path):
    assert choose(folder_of(tokenizer_folder), [text(1)]) == ("gigatoken", "")


def test_the_fast_encoder_adds_the_references_special_tokens(tmp_path: Path):
    post = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    folder = bpe(tmp_path / "t", post_processor=post)
    assert choose(folder) == ("gigatoken", "")
    rows = FastEncoder(folder, ReferenceEncoder(folder)).encode(["the ship", "", "sails <s> on"])
    expected = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))(["the ship", "", "sails <s> on"])
    assert rows.tokens.tolist() == [number for row in expected["input_ids"] for number in row]


UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "WordPiece": (
        lambda: Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        "WordPiece is not byte-level",
    ),
    "Unigram": (lambda: Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)), "Unigram is not byte-level BPE"),
    "BPE of characters": (lambda: Tokenizer(models.BPE()), "BPE is not byte-level BPE"),
}


@pytest.mark.parametrize(("build", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_the_reference_is_chosen_for_other_models(tmp_path: Path, build: Any, reason: str):
    name, why = choose(save(tmp_path / "t", build()))
    assert name == "tokenizers" and reason in why


def test_the_reference_is_chosen_for_a_normalizer(tmp_path: Path):
    folder = bpe(tmp_path / "t", normalizer=normalizers.Lowercase())
    assert choose(folder) == ("tokenizers", "normalizer Lowercase")


def break_fast_encoder(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """Make the fast encoder give wrong ids for texts that contain a word."""
    encode_correctly = FastEncoder.encode

    def encode(self: FastEncoder, texts: list[str]) -> TokenRows:
        rows = encode_correctly(self, texts)
        return TokenRows(rows.tokens + np.uint32(any(word in text for text in texts)), rows.lengths)

    monkeypatch.setattr(FastEncoder, "encode", encode)


def test_a_difference_in_the_sample_is_reported_and_the_reference_chosen(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", (text(i) for i in range(100)))
    expected = make_shards(tmp_path / "a", tokenizer_folder, [corpus], dataset())
    break_fast_encoder(monkeypatch, "Document 0")
    manifest = make_shards(tmp_path / "b", tokenizer_folder, [corpus], dataset())
    assert manifest.encoder["name"] == "tokenizers" and "'Document 0. the" in manifest.encoder["reason"]
    assert "encoding with tokenizers: gigatoken and tokenizers give different ids" in capsys.readouterr().err
    assert [s["sha256"] for s in manifest.splits["train"]["shards"]] == [
        s["sha256"] for s in expected.splits["train"]["shards"]
    ]


def test_after_a_difference_in_a_chunk_the_reference_encodes_the_whole_dataset(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", (text(i) for i in range(300)))
    expected = make_shards(tmp_path / "a", tokenizer_folder, [corpus], dataset(chunk_mb=0.02))
    monkeypatch.setattr(choose_encoder, "_stress_texts", lambda folder: [])
    monkeypatch.setattr("longhaul.data.shards.source_index._sample_texts", lambda *arguments: [])
    break_fast_encoder(monkeypatch, "Document 25")
    monkeypatch.setattr("longhaul.data.tokenizers.document_encoder._EXCERPTS_PER_BATCH", 1000)
    manifest = make_shards(tmp_path / "b", tokenizer_folder, [corpus], dataset(chunk_mb=0.02))
    assert manifest.encoder["name"] == "tokenizers" and "Document 25" in manifest.encoder["reason"]
    assert [s["sha256"] for s in manifest.splits["train"]["shards"]] == [
        s["sha256"] for s in expected.splits["train"]["shards"]
    ]
