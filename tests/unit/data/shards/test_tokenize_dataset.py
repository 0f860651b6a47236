"""Shards contain every document once, are equal for equal sources, and mark the assistant's tokens."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from longhaul.artifacts.artifact_schemas import DataManifest, TokenizerManifest
from longhaul.artifacts.atomic_files import file_sha256
from longhaul.data.shards import tokenize_dataset
from longhaul.data.shards.shard_reader import SplitReader
from longhaul.data.shards.unigram_entropy import entropy, unigram_entropy
from longhaul.errors import UserError
from tests.support.corpora import conversation, dataset, make_shards, text, tokenize_job, write_jsonl


def split(manifest: DataManifest, name: str) -> SplitReader:
    return SplitReader(Path(manifest.path), manifest.splits[name], with_mask=manifest.kind == "chat")


def stream(manifest: DataManifest, name: str) -> list[int]:
    reader = split(manifest, name)
    return reader.tokens(0, reader.token_count).tolist()


def documents(manifest: DataManifest, name: str) -> list[tuple[int, ...]]:
    """Return the tokens of each document of a split."""
    reader, rows, start = split(manifest, name), [], 0
    for length in reader.lengths().tolist():
        rows.append(tuple(reader.tokens(start, start + length).tolist()))
        start += length
    return rows


def tokenizer_of(folder: Path) -> tuple[Tokenizer, TokenizerManifest]:
    manifest = TokenizerManifest.read(folder / "tokenizer.json")
    return Tokenizer.from_file(str(Path(manifest.path) / "tokenizer.json")), manifest


def test_every_document_is_written_once_and_ends_with_eos(text_shards: DataManifest, tokenizer_folder: Path):
    tokenizer, manifest = tokenizer_of(tokenizer_folder)
    expected = [(*tokenizer.encode(text(i, 5 + i % 60)).ids, manifest.eos_id) for i in range(300)]
    found = documents(text_shards, "train") + documents(text_shards, "validation")
    assert sorted(found) == sorted(expected)
    assert 10 < len(documents(text_shards, "validation")) < 60
    (source,) = text_shards.sources
    assert source["documents"] == 300 and source["sha256"] == file_sha256(Path(source["path"]))
    assert text_shards.skipped == {} and text_shards.tokenizer_hash == manifest.hash


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(TEXT, min_size=1, max_size=12), min_size=1, max_size=3),
    st.integers(20, 400),
    st.sampled_from([0.0, 0.3]),
)
def test_any_documents_are_written_whole_and_in_order(
    tokenizer_folder: Path, files: list[list[str]], chunk_bytes: int, validation_fraction: float
):
    """This holds for any chunk size, and for equal files and documents. Other tests cover the stress corpus."""
    tokenizer, manifest = tokenizer_of(tokenizer_folder)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("longhaul.data.tokenizers.choose_encoder._stress_texts", lambda folder: [])
        paths = [write_jsonl(Path(name) / f"{i}.jsonl", "text", texts) for i, texts in enumerate(files)]
        # Smaller chunks than a config allows, so that small files are divided.
        small_chunks = dataset(validation_fraction=validation_fraction).model_copy(
            update={"chunk_mb": chunk_bytes / 1e6}
        )
        result = make_shards(Path(name), tokenizer_folder, paths, small_chunks)
        left = {split: documents(result, split) for split in result.splits}
    rows = [(*tokenizer.encode(text).ids, manifest.eos_id) for texts in files for text in texts]
    assert sum(map(len, rows)) == sum(entry["tokens"] for entry in result.splits.values())
    for row in rows:
        (taken, *_) = [split for split, waiting in left.items() if waiting[:1] == [row]] or ["train"]
        assert left[taken][:1] == [row]
        del left[taken][0]
    assert not any(left.values())


def test_a_split_keeps_the_order_of_the_files(text_shards: DataManifest, tokenizer_folder: Path):
    tokenizer, _ = tokenizer_of(tokenizer_folder)
    numbers = [int(tokenizer.decode(list(row)).split(".")[0].split()[1]) for row in documents(text_shards, "train")]
    assert numbers == sorted(numbers)


def test_entropy_is_that_of_the_training_tokens(text_shards: DataManifest):
    counts = np.bincount(stream(text_shards, "train"))
    assert text_shards.unigram_entropy_nats == pytest.approx(entropy(counts), rel=1e-12)
    assert entropy(np.array([5, 5, 5, 5])) == pytest.approx(np.log(4))
    assert entropy(np.array([7, 0])) == 0.0


def test_entropy_of_a_large_split_comes_from_an_even_sample(chat_shards: DataManifest, monkeypatch: pytest.MonkeyPatch):
    reader = SplitReader(Path(chat_shards.path), chat_shards.splits["train"], with_mask=True)
    read: list[tuple[int, int]] = []
    monkeypatch.setattr("longhaul.data.shards.unigram_entropy._SAMPLED_TOKENS", reader.token_count // 2)
    monkeypatch.setattr("longhaul.data.shards.unigram_entropy._SAMPLED_RANGES", 8)
    read_loss_tokens = reader.loss_tokens
    monkeypatch.setattr(
        reader, "loss_tokens", lambda start, stop: read.append((start, stop)) or read_loss_tokens(start, stop)
    )
    assert unigram_entropy(reader) == pytest.approx(chat_shards.unigram_entropy_nats, abs=0.2)
    assert len(read) == 8 and read[0][0] == 0 and read[-1][1] == reader.token_count
    assert {stop - start for start, stop in read} == {reader.token_count // 2 // 8}
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(read))


def test_loss_tokens_are_those_of_the_mask(chat_shards: DataManifest):
    reader = SplitReader(Path(chat_shards.path), chat_shards.splits["train"], with_mask=True)
    mask = np.concatenate([reader.document(number)[1] for number in range(reader.document_count)])
    start, stop = 7, reader.token_count - 5
    expected = reader.tokens(start, stop)[mask[start:stop] == 1]
    assert 0 < len(expected) < stop - start and reader.loss_tokens(start, stop).tolist() == expected.tolist()


def test_the_number_of_workers_does_not_change_the_bytes(tmp_path: Path, tokenizer_folder: Path):
    """The text is large enough for two workers."""
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", (text(i, 1200) for i in range(800)))
    assert corpus.stat().st_size > 4_000_000
    results = [make_shards(tmp_path / str(n), tokenizer_folder, [corpus], dataset(), workers=n) for n in (1, 2)]
    assert results[0].splits == results[1].splits and results[0].hash == results[1].hash


def test_new_documents_do_not_change_the_split_of_old_ones(tmp_path: Path, tokenizer_folder: Path):
    settings = dataset(validation_fraction=0.2)
    few = write_jsonl(tmp_path / "few.jsonl", "text", (text(i) for i in range(100)))
    many = write_jsonl(tmp_path / "many.jsonl", "text", (text(i) for i in range(150)))
    before = make_shards(tmp_path / "a", tokenizer_folder, [few], settings)
    after = make_shards(tmp_path / "b", tokenizer_folder, [many], settings)
    for name in ("train", "validation"):
        assert set(documents(before, name)) < set(documents(after, name))


def test_a_tiny_validation_fraction_gives_one_document_and_zero_gives_none(tmp_path: Path, tokenizer_folder: Path):
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", (text(i) for i in range(5)))
    tiny = make_shards(tmp_path / "a", tokenizer_folder, [corpus], dataset(validation_fraction=1e-9))
    none = make_shards(tmp_path / "b", tokenizer_folder, [corpus], dataset(validation_fraction=0.0))
    assert [tiny.splits[name]["documents"] for name in ("train", "validation")] == [4, 1]
    assert [none.splits[name]["documents"] for name in ("train", "validation")] == [5, 0]


def test_equal_sources_reuse_shards_and_a_changed_source_gets_a_new_folder(tmp_path: Path, tokenizer_folder: Path):
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", (text(i) for i in range(20)))
    first = make_shards(tmp_path, tokenizer_folder, [corpus], dataset())
    shard = Path(first.path) / f"{first.splits['train']['shards'][0]['prefix']}.bin"
    written = shard.stat().st_mtime_ns
    moved = corpus.rename(tmp_path / "b.jsonl")
    again = make_shards(tmp_path, tokenizer_folder, [moved], dataset())
    assert again.splits == first.splits and again.hash == first.hash and shard.stat().st_mtime_ns == written
    assert again.sources[0]["path"] == str(moved)
    write_jsonl(moved, "text", (text(i) for i in range(21)))
    changed = make_shards(tmp_path, tokenizer_folder, [moved], dataset())
    assert changed.hash != first.hash and changed.splits != first.splits and shard.exists()


@pytest.mark.parametrize(
    "settings",
    [dataset(validation_fraction=0.3), dataset(columns={"text": "other"})],
    ids=["validation fraction", "column"],
)
def test_settings_that_change_the_shards_change_the_folder(tmp_path: Path, tokenizer_folder: Path, settings: Any):
    lines = [json.dumps({"text": text(i), "other": text(i + 1)}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    first = make_shards(tmp_path, tokenizer_folder, [tmp_path / "a.jsonl"], dataset())
    second = make_shards(tmp_path, tokenizer_folder, [tmp_path / "a.jsonl"], settings)
    assert second.hash != first.hash and second.splits != first.splits


def test_loss_tokens_are_the_assistants_turns_with_eos(chat_shards: DataManifest, tokenizer_folder: Path):
    tokenizer, manifest = tokenizer_of(tokenizer_folder)
    expected = []
    for number in range(200):
        answers = [m["content"] for m in conversation(number, 1 + number % 3) if m["role"] == "assistant"]
        expected.append("|".join(answer.strip() for answer in answers))
    found = []
    for name in ("train", "validation"):
        reader = split(chat_shards, name)
        for index in range(len(reader.lengths())):
            tokens, mask = reader.document(index)
            turns = np.split(tokens[mask == 1], np.flatnonzero(tokens[mask == 1] == manifest.eos_id) + 1)
            assert len(turns[-1]) == 0, "a turn without EOS"
            found.append("|".join(tokenizer.decode(turn[:-1].tolist()).strip() for turn in turns[:-1]))
    assert sorted(found) == sorted(expected)
    assert chat_shards.splits["train"]["loss_tokens"] < chat_shards.splits["train"]["tokens"]


def test_documents_without_anything_to_train_on_are_counted(tmp_path: Path, tokenizer_folder: Path):
    empty = write_jsonl(tmp_path / "a.jsonl", "text", ["", text(1), "", text(2)])
    assert make_shards(tmp_path / "a", tokenizer_folder, [empty], dataset()).skipped == {"empty text": 2}
    conversations = [[{"role": "user", "content": "anyone?"}], conversation(1), conversation(2)]
    chats = write_jsonl(tmp_path / "b.jsonl", "messages", conversations)
    assert make_shards(tmp_path / "b", tokenizer_folder, [chats], dataset("chat")).skipped == {"no assistant turn": 1}
    with pytest.raises(UserError, match="no document can be trained on"):
        nothing = write_jsonl(tmp_path / "c.jsonl", "text", ["", ""])
        make_shards(tmp_path / "c", tokenizer_folder, [nothing], dataset())
    corrected = write_jsonl(tmp_path / "c.jsonl", "text", ["", text(1)])
    assert make_shards(tmp_path / "c", tokenizer_folder, [corrected], dataset())
    other = tmp_path / "d.jsonl"
    other.write_text(json.dumps({"text": "", "body": text(1)}) + "\n")
    assert make_shards(tmp_path / "d", tokenizer_folder, [other], dataset(columns={"text": "body"}))


def test_an_empty_assistant_turn_is_refused_until_the_remedy_is_followed(tmp_path: Path, tokenizer_folder: Path):
    first: list[Any] = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]
    second: list[Any] = [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A"}]
    chats = write_jsonl(tmp_path / "a.jsonl", "messages", [first + second])
    with pytest.raises(UserError, match="an assistant turn has no text in the loss") as refused:
        make_shards(tmp_path, tokenizer_folder, [chats], dataset("chat"))
    assert "remove the turn, or give it weight: 0" in refused.value.hint
    for messages in (second, [first[0], first[1] | {"weight": 0}, *second]):
        write_jsonl(chats, "messages", [messages])
        assert make_shards(tmp_path, tokenizer_folder, [chats], dataset("chat"))


def test_a_job_without_files_template_or_folder_is_refused_until_it_has_them(tmp_path: Path, tokenizer_folder: Path):
    chats = write_jsonl(tmp_path / "a.jsonl", "messages", [conversation(i) for i in range(4)])
    job = tokenize_job(tmp_path, tokenizer_folder, [chats], dataset("chat"))
    bare = TokenizerManifest.read(tokenizer_folder / "tokenizer.json")
    dataclasses.replace(bare, has_chat_template=False).write(tmp_path / "bare.json")
    chats.with_name("file").touch()
    for changes, message, remedy in (
        ({"files": ()}, "the dataset has no files", "check its `files`"),
        (
            {"tokenizer": str(tmp_path / "bare.json")},
            "the tokenizer has no chat template",
            "set tokenizer.chat_template",
        ),
        (
            {"folder": str(tmp_path / "file/data")},
            "writing dataset corpus to .*file/data",
            "choose another folder in storage.data",
        ),
    ):
        with pytest.raises(UserError, match=message) as refused:
            tokenize_dataset.run(job.model_copy(update=changes))
        assert remedy in refused.value.hint
    tokenize_dataset.run(job)


def test_what_nothing_reads_is_in_the_manifest_and_the_log(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
):
    turns = [{"role": "user", "content": "Q", "name": "Ann"}, {"role": "assistant", "content": "A <|im_end|>"}]
    rows = [{"id": number, "messages": [{**turns[0], "content": f"Q{number}"}, turns[1]]} for number in range(6)]
    corpus = tmp_path / "a.jsonl"
    corpus.write_text("\n".join(map(json.dumps, rows)))
    # Each conversation is a chunk of its own.
    manifest = make_shards(tmp_path, tokenizer_folder, [corpus], dataset("chat", chunk_mb=1e-4))
    assert manifest.unread == {"columns": {"id": 6}, "message_keys": {"user.name": 6}}
    assert manifest.control_texts == 6
    log = capsys.readouterr().err
    assert (
        "dataset corpus: nothing reads the columns id (6 rows); the message keys name of role user (6 messages); nothing of"
        in log
    )
    assert "6 conversations contain the text of a control token" in log
