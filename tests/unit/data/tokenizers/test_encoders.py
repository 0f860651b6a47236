"""The fast encoder is used where it gives the reference's ids, and only there."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longhaul.artifacts.schemas import TokenizerManifest
from longhaul.data.readers.documents import Document
from longhaul.data.tokenizers import choose_encoder as choice
from longhaul.data.tokenizers.chat_template import ChatTemplate, without_reasoning
from longhaul.data.tokenizers.choose_encoder import Choice, choose, hard_ids
from longhaul.data.tokenizers.document_encoder import Encoder
from longhaul.data.tokenizers.encoders import Fast, Reference, Rows, with_added
from longhaul.data.tokenizers.stress_corpus import hard_texts
from longhaul.errors import UserError
from longhaul.jobs.launch_files import REPOSITORY
from tests.support.corpora import conversation, dataset, make_shards, text, write_jsonl


def folder_of(manifest_folder: Path) -> Path:
    return Path(TokenizerManifest.read(manifest_folder / "tokenizer.json").path)


def save(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def bpe(folder: Path, **parts: Any) -> Path:
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


def chosen(folder: Path, sample: Sequence[str] = ()) -> Choice:
    return choose(folder, list(hard_ids(folder)), sample)


def test_the_runs_own_tokenizer_is_encoded_fast(tokenizer_folder: Path):
    assert chosen(folder_of(tokenizer_folder), [text(1)]) == ("gigatoken", "")


def test_hard_texts_give_autotokenizers_ids(tokenizer_folder: Path):
    folder = folder_of(tokenizer_folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = hard_texts(["<|im_start|>", "<|endoftext|>"])
    rows = Fast(folder, Reference(folder)).encode(texts)
    expected = theirs(texts)["input_ids"]
    assert rows.lengths.tolist() == [len(row) for row in expected]
    assert rows.tokens.tolist() == [number for row in expected for number in row]
    assert sum(len(part.encode()) for part in texts) > 1_000_000


def test_hard_texts_have_every_character_alone_as_well():
    texts = hard_texts([])
    assigned = {
        chr(code) for code in range(sys.maxunicode) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
    }
    alone = {word for part in texts for word in part.split(" ") if len(word) == 1}
    assert len(assigned) > 140_000 and assigned - alone <= {" "}


def test_added_special_tokens_are_the_references(tmp_path: Path):
    post = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    folder = bpe(tmp_path / "t", post_processor=post)
    assert chosen(folder) == ("gigatoken", "")
    rows = Fast(folder, Reference(folder)).encode(["the ship", "", "sails <s> on"])
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))(["the ship", "", "sails <s> on"])
    assert rows.tokens.tolist() == [number for row in theirs["input_ids"] for number in row]


UNFIT: dict[str, tuple[Any, str]] = {
    "WordPiece": (
        lambda: Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        "WordPiece is not byte-level",
    ),
    "Unigram": (lambda: Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)), "Unigram is not byte-level BPE"),
    "BPE of characters": (lambda: Tokenizer(models.BPE()), "BPE is not byte-level BPE"),
}


@pytest.mark.parametrize(("make", "reason"), UNFIT.values(), ids=UNFIT)
def test_other_models_are_left_to_the_reference(tmp_path: Path, make: Any, reason: str):
    name, why = chosen(save(tmp_path / "t", make()))
    assert name == "tokenizers" and reason in why


def test_a_normalizer_that_rewrites_text_is_left_to_the_reference(tmp_path: Path):
    folder = bpe(tmp_path / "t", normalizer=normalizers.Lowercase())
    assert chosen(folder) == ("tokenizers", "normalizer Lowercase")


def off_by_one(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """A fast encoder that is wrong about one word."""
    honest = Fast.encode

    def encode(self: Fast, texts: list[str]) -> Rows:
        rows = honest(self, texts)
        return Rows(rows.tokens + np.uint32(any(word in text for text in texts)), rows.lengths)

    monkeypatch.setattr(Fast, "encode", encode)


def test_a_difference_on_the_sample_is_named_and_the_reference_taken(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", (text(i) for i in range(100)))
    honest = make_shards(tmp_path / "a", tokenizer_folder, [corpus], dataset())
    off_by_one(monkeypatch, "Document 0")
    made = make_shards(tmp_path / "b", tokenizer_folder, [corpus], dataset())
    assert made.encoder["name"] == "tokenizers" and "'Document 0. the" in made.encoder["reason"]
    assert "encoding with tokenizers: gigatoken gives other ids" in capsys.readouterr().err
    assert [s["sha256"] for s in made.splits["train"]["shards"]] == [
        s["sha256"] for s in honest.splits["train"]["shards"]
    ]


def test_a_difference_found_in_a_unit_makes_the_whole_dataset_anew(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", (text(i) for i in range(300)))
    honest = make_shards(tmp_path / "a", tokenizer_folder, [corpus], dataset(chunk_mb=0.02))
    monkeypatch.setattr(choice, "_hard_texts", lambda folder: [])
    monkeypatch.setattr("longhaul.data.shards.source_index._sample", lambda *arguments: [])
    off_by_one(monkeypatch, "Document 25")
    monkeypatch.setattr("longhaul.data.tokenizers.document_encoder._CHECKED_PER_BATCH", 1000)
    made = make_shards(tmp_path / "b", tokenizer_folder, [corpus], dataset(chunk_mb=0.02))
    assert made.encoder["name"] == "tokenizers" and "Document 25" in made.encoder["reason"]
    assert [s["sha256"] for s in made.splits["train"]["shards"]] == [
        s["sha256"] for s in honest.splits["train"]["shards"]
    ]


def test_an_id_beyond_the_vocabulary_is_a_difference_wherever_it_stands(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """In uint16 it would be another token; no piece of that document is compared."""
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", (text(i) for i in range(300)))
    honest = make_shards(tmp_path / "a", tokenizer_folder, [corpus], dataset())
    encode = Fast.encode

    def beyond(self: Fast, texts: list[str]) -> Rows:
        rows = encode(self, texts)
        return Rows(rows.tokens + np.uint32(1 << 16) * (len(texts) == 300), rows.lengths)

    monkeypatch.setattr(Fast, "encode", beyond)
    made = make_shards(tmp_path / "b", tokenizer_folder, [corpus], dataset())
    assert made.encoder["name"] == "tokenizers"
    assert re.fullmatch(r"gigatoken gives id \d+ of a vocabulary of \d+", made.encoder["reason"])
    for split, entry in honest.splits.items():
        assert [s["sha256"] for s in made.splits[split]["shards"]] == [s["sha256"] for s in entry["shards"]]


def test_pieces_of_a_units_beginning_are_twice_as_long(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch):
    manifest = TokenizerManifest.read(tokenizer_folder / "tokenizer.json")
    encoder = Encoder(manifest, dataset(), "gigatoken")
    compared: list[list[str]] = []
    monkeypatch.setattr(
        "longhaul.data.tokenizers.document_encoder.first_difference",
        lambda fast, reference, pieces: compared.append(pieces),
    )
    documents = [Document("word " * 1000, "here", 0)] * 10
    for _ in range(2):
        encoder.encode(documents)
        encoder.encode(documents)
        encoder.check()
    assert [[len(piece) for piece in pieces] for pieces in compared] == 2 * [[500] * 4 + [250] * 4]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=8),
    st.lists(st.integers(0, 9), max_size=2),
    st.booleans(),
)
def test_added_ids_stand_where_they_belong(rows: list[list[int]], prefix: list[int], has_suffix: bool):
    suffix = [3] if has_suffix else []
    flat = Rows(np.array([n for row in rows for n in row], np.uint32), np.array([len(row) for row in rows], np.int64))
    made = with_added(with_added(flat, prefix, suffix), (), (), 5)
    expected = [[*prefix, *row, *suffix] for row in rows]
    expected = [row if row and row[-1] == 5 else [*row, 5] for row in expected]
    assert made.lengths.tolist() == [len(row) for row in expected]
    assert made.tokens.tolist() == [n for row in expected for n in row]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_masks_of_both_encoders_agree(tokenizer_folder: Path, data: st.DataObject):
    folder = folder_of(tokenizer_folder)
    written = data.draw(st.text(min_size=1, max_size=60))
    start = data.draw(st.integers(0, len(written)))
    spans = [[(start, data.draw(st.integers(start, len(written))))]]
    reference = Reference(folder)
    ours = Fast(folder, reference).encode_with_mask([written], spans)
    theirs = reference.encode_with_mask([written], spans)
    assert ours[0].tokens.tolist() == theirs[0].tokens.tolist() and ours[1].tolist() == theirs[1].tolist()


REASONING = "<think>First 40, then 2.</think>It is 42."


@pytest.mark.parametrize("in_loss", [True, False])
def test_reasoning_is_in_the_loss_or_context_alone(tmp_path: Path, tokenizer_folder: Path, in_loss: bool):
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": REASONING}] for i in range(3)]
    corpus = write_jsonl(tmp_path / "a.jsonl", "messages", chats)
    made = make_shards(
        tmp_path, tokenizer_folder, [corpus], dataset("chat", reasoning_in_loss=in_loss, validation_fraction=0)
    )
    from longhaul.data.shards.indexed_dataset import SplitReader

    tokens, mask = SplitReader(Path(made.path), made.splits["train"], with_mask=True).document(0)
    tokenizer = AutoTokenizer.from_pretrained(folder_of(tokenizer_folder))
    trained_on = tokenizer.decode(tokens[mask == 1])
    assert "It is 42." in trained_on and ("First 40" in trained_on) == in_loss
    assert "First 40" in tokenizer.decode(tokens)


def test_reasoning_that_the_template_opened_is_left_out_from_its_start():
    spoken = "Q<think>because</think>A<think>x</think>B"
    assert without_reasoning(spoken, [(8, len(spoken))]) == [(23, 24), (40, 41)]
    assert without_reasoning("plain", [(0, 5)]) == [(0, 5)]


def test_the_template_for_r1_keeps_the_reasoning_and_marks_it():
    text = (REPOSITORY / "templates/chat/deepseek-r1.jinja").read_text()
    template = ChatTemplate(text, {"bos_token": "<b>", "eos_token": "<e>"})
    turns = [{"role": "user", "content": "6 x 7?"}, {"role": "assistant", "content": REASONING}]
    rendered, ((start, end),) = template.render(turns, "a.jsonl:1")
    assert rendered == f"<b><｜User｜>6 x 7?<｜Assistant｜>{REASONING}<e>"
    assert rendered[start:end] == f"{REASONING}<e>"


def test_reasoning_that_nothing_ends_is_left_out_to_the_end_of_the_turn():
    assert without_reasoning("Q yes<think>but then", [(2, 20)]) == [(2, 5)]
    assert without_reasoning("<think>a</think>b<think>c", [(0, 25)]) == [(16, 17)]


def test_whatever_a_template_raises_is_told_with_the_place():
    endless = ChatTemplate("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {"eos_token": "<e>"})
    for template in (endless, ChatTemplate("{{ 1 // 0 }}", {"eos_token": "<e>"})):
        with pytest.raises(UserError, match=r"a.jsonl:7: the chat template refuses this conversation: \w+Error"):
            template.render([{"role": "user", "content": "Q"}], "a.jsonl:7")


def test_prompt_and_completion_make_a_conversation(tmp_path: Path, tokenizer_folder: Path):
    lines = [json.dumps({"p": f"Q{i}", "c": "A"}) for i in range(3)] + [
        '{"p": [{"role": "user", "content": "Q"}], "c": "A"}'
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    columns = {"prompt": "p", "completion": "c"}
    made = make_shards(
        tmp_path, tokenizer_folder, [tmp_path / "a.jsonl"], dataset("chat", columns=columns, validation_fraction=0)
    )
    assert made.splits["train"]["documents"] == 4 and made.splits["train"]["loss_tokens"] >= 8
    with pytest.raises(UserError, match=r"a.jsonl:1: no column 'x'"):
        bad = dataset("chat", columns={"prompt": "p", "completion": "x"})
        make_shards(tmp_path / "b", tokenizer_folder, [tmp_path / "a.jsonl"], bad)


def test_a_conversation_that_the_template_refuses_is_named_or_left_out(tmp_path: Path, tokenizer_folder: Path):
    chats = [conversation(0), conversation(1), conversation(2)]
    corpus = write_jsonl(tmp_path / "a.jsonl", "messages", chats)
    from longhaul.data.tokenizers.chat_template import ChatTemplate

    template = ChatTemplate("{{ raise_exception('not with me') }}", {"eos_token": "<|endoftext|>"})
    with pytest.raises(UserError, match="here: the chat template refuses this conversation: not with me"):
        template.render(chats[0], "here")
    assert make_shards(tmp_path, tokenizer_folder, [corpus], dataset("chat")).skipped == {}
