"""Readers leave out duplicates and documents with evaluation texts; no filter setting changes the shards."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.data.filters.filter_documents import label_near_duplicates
from longhaul.data.filters.near_duplicates import minhash_bands
from longhaul.data.filters.word_ngrams import ngrams, split_words
from longhaul.data.sampling.samples import Samples
from longhaul.data.shards.filtered_out_table import filter_table
from longhaul.data.shards.shard_reader import SplitReader
from longhaul.data.shards.shard_writer import SplitWriter
from longhaul.data.shards.unigram_entropy import entropy
from longhaul.errors import UserError
from tests.support.corpora import WORDS, conversation, dataset, make_shards, text, write_jsonl

QUESTION = "How many ships of the old fleet sail over calm water while the stars turn above them tonight"


def long_text(number: int) -> str:
    """Return 200 words; texts of two numbers have no five consecutive words in common."""
    generator = random.Random(number)
    return " ".join(f"{generator.choice(WORDS[:15])}{generator.randrange(1000)}" for _ in range(200))


def one_word_changed(written: str) -> str:
    return written.replace(written.split()[100], "otherwise")


def documents(manifest: DataManifest, folder: Path, split: str = "train") -> list[str]:
    """Return the documents of a split as a reader gives them, decoded."""
    decode = Tokenizer.from_file(str(next((folder / "tokenizers").glob("*/tokenizer.json")))).decode
    reader = SplitReader(Path(manifest.path), manifest.splits[split], with_mask=manifest.kind == "chat")
    return [decode(reader.document(number)[0].tolist()) for number in range(reader.document_count)]


def modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.bin")}


@pytest.mark.parametrize(
    ("deduplicate", "stays", "skipped"),
    [
        ("none", [0, 1, 0, "changed", 2, 1], {}),
        ("exact", [0, 1, "changed", 2], {"exact duplicate": 2}),
        ("near", [0, 1, 2], {"exact duplicate": 2, "near duplicate": 1}),
    ],
)
def test_the_first_of_duplicate_documents_stays(
    tmp_path: Path, tokenizer_folder: Path, deduplicate: str, stays: list[object], skipped: dict[str, int]
):
    written = {0: long_text(0), 1: long_text(1), 2: long_text(2), "changed": one_word_changed(long_text(1))}
    files = [
        write_jsonl(tmp_path / "a.jsonl", "text", [written[0], written[1]]),
        write_jsonl(tmp_path / "b.jsonl", "text", [written[0], written["changed"], written[2], written[1]]),
    ]
    manifest = make_shards(tmp_path, tokenizer_folder, files, dataset(deduplicate=deduplicate, validation_fraction=0))
    assert documents(manifest, tokenizer_folder) == [written[name] for name in stays]
    assert manifest.skipped == skipped
    assert manifest.splits["train"]["documents"] == len(stays)


def test_another_filter_setting_keeps_the_shards_and_changes_the_hash(tmp_path: Path, tokenizer_folder: Path):
    files = [write_jsonl(tmp_path / "a.jsonl", "text", [long_text(i % 30) for i in range(90)])]
    small = {"chunk_mb": 0.02, "validation_fraction": 0}
    plain = make_shards(tmp_path, tokenizer_folder, files, dataset(**small))
    before = modification_times(tmp_path / "data")
    near = make_shards(tmp_path, tokenizer_folder, files, dataset(**small, deduplicate="near"), workers=2)
    assert modification_times(tmp_path / "data") == before
    assert (near.skipped, near.splits["train"]["documents"]) == ({"exact duplicate": 60}, 30)
    again = make_shards(tmp_path, tokenizer_folder, files, dataset(**small))
    assert (again.hash, again.splits) == (plain.hash, plain.splits) and near.hash != plain.hash


def test_a_new_file_is_encoded_alone_and_only_its_duplicates_are_filtered_out(tmp_path: Path, tokenizer_folder: Path):
    near = dataset(deduplicate="near", chunk_mb=0.02, validation_fraction=0)
    files = [write_jsonl(tmp_path / "a.jsonl", "text", [long_text(i) for i in range(40)])]
    make_shards(tmp_path, tokenizer_folder, files, near)
    before = modification_times(tmp_path / "data")
    files.append(write_jsonl(tmp_path / "b.jsonl", "text", [one_word_changed(long_text(i)) for i in range(30, 60)]))
    manifest = make_shards(tmp_path, tokenizer_folder, files, near)
    after = modification_times(tmp_path / "data")
    assert {path: after[path] for path in before} == before
    assert documents(manifest, tokenizer_folder) == [
        *(long_text(i) for i in range(40)),
        *(one_word_changed(long_text(i)) for i in range(40, 60)),
    ]


def test_workers_and_chunk_size_do_not_change_what_stays(tmp_path: Path, tokenizer_folder: Path):
    texts = [one_word_changed(long_text(i % 70)) if i % 3 else long_text(i % 70) for i in range(210)]
    files = [write_jsonl(tmp_path / "a.jsonl", "text", texts * 20)]
    near = {"deduplicate": "near", "validation_fraction": 0.1}
    one = make_shards(tmp_path / "one", tokenizer_folder, files, dataset(**near))
    two = make_shards(tmp_path / "two", tokenizer_folder, files, dataset(**near, chunk_mb=0.5), workers=2)
    assert one.skipped == two.skipped and one.skipped["near duplicate"] == 70
    for split in one.splits:
        assert documents(one, tokenizer_folder, split) == documents(two, tokenizer_folder, split)


def test_similar_texts_share_a_band_and_others_do_not():
    """With one of 200 words changed the Jaccard index is 0.95; with half of the words changed it is at most 0.33."""
    pairs = [(split_words(long_text(i)), split_words(one_word_changed(long_text(i)))) for i in range(100)]
    halves = [split_words(long_text(i))[:100] + split_words(long_text(1000 + i))[100:] for i in range(100)]
    originals, changed = (minhash_bands(list(rows)) for rows in zip(*pairs, strict=True))
    assert (originals == changed).any(axis=1).all()
    assert (originals == minhash_bands(halves)).any(axis=1).sum() <= 2


@given(st.integers(1, 40).flatmap(lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), max_size=4)))
@settings(max_examples=100, deadline=None)
def test_near_duplicate_groups_equal_a_graph_search(bands: list[list[int]]):
    count = len(bands[0]) if bands else 3
    reads = [lambda band=band: np.array(band, np.uint64) for band in bands]
    expected = list(range(count))
    for start in range(count):
        queue = [start] if expected[start] == start else []
        while queue:
            one = queue.pop()
            for other in range(count):
                if other > start and expected[other] == other and any(band[one] == band[other] for band in bands):
                    expected[other] = start
                    queue.append(other)
    assert label_near_duplicates(reads, count).tolist() == expected


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_reader_leaves_out_exactly_the_filtered_documents(data: st.DataObject):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=30))
    is_filtered = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    rows = np.split(np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)[:-1])
    staying = [row.tolist() for row, is_out in zip(rows, is_filtered, strict=True) if not is_out]
    with tempfile.TemporaryDirectory() as name:
        writer = SplitWriter(Path(name), "train", "uint16", False, max_bytes=data.draw(st.integers(2, 60)))
        writer.add(np.concatenate(rows), np.array(lengths, np.int32), None)
        entry = writer.close()
        if is_filtered.any():
            np.save(Path(name) / "filtered.npy", filter_table(np.array(lengths, np.int32), is_filtered))
            entry["filtered_out"] = "filtered.npy"
        reader = SplitReader(Path(name), entry, with_mask=False)
        assert [reader.document(i)[0].tolist() for i in range(reader.document_count)] == staying
        assert reader.lengths().tolist() == [len(row) for row in staying]
        stream = [token for row in staying for token in row]
        assert reader.token_count == len(stream)
        start = data.draw(st.integers(0, len(stream)))
        stop = data.draw(st.integers(start, len(stream)))
        assert reader.tokens(start, stop).tolist() == stream[start:stop]


def evaluation(folder: Path, texts: Sequence[str]) -> tuple[dict[str, object], list[Path]]:
    path = write_jsonl(folder / "evaluation.jsonl", "question", texts)
    return {"files": (str(path),), "columns": ("question",)}, [path]


def test_documents_with_an_evaluation_text_are_filtered_out_and_listed(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
):
    hidden = f"{text(1)} «{QUESTION.upper().replace(' ', ', ')}!» {text(2)}"
    shorter = f"{text(3)} {' '.join(QUESTION.split()[:12])} {text(4)}"
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", [text(5), hidden, shorter, hidden])
    against, files = evaluation(tmp_path, ["Too short.", QUESTION])
    settings = dataset(decontaminate=against, deduplicate="exact", validation_fraction=0)
    manifest = make_shards(tmp_path, tokenizer_folder, [corpus], settings, evaluation=files)
    assert documents(manifest, tokenizer_folder) == [text(5), shorter]
    assert manifest.skipped == {"contaminated": 2}
    (report,) = Path(manifest.path).glob("filtered-*/contaminated.jsonl")
    listed = [json.loads(line) for line in report.read_text().splitlines()]
    assert [match["document"] for match in listed] == [f"{corpus}:2", f"{corpus}:4"]
    assert listed[0]["evaluation"] == f"{files[0]}:2" and listed[0]["words"] == " ".join(split_words(QUESTION)[:13])
    assert "2 evaluation texts; 1 of them are shorter than 13 words" in capsys.readouterr().err


def test_another_evaluation_text_changes_what_stays(tmp_path: Path, tokenizer_folder: Path):
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", [text(5), QUESTION, f"{QUESTION} again", text(6)])
    manifests = []
    for texts in (["nothing of it"], [QUESTION]):
        against, files = evaluation(tmp_path, texts)
        settings = dataset(decontaminate=against, validation_fraction=0)
        manifests.append(make_shards(tmp_path, tokenizer_folder, [corpus], settings, evaluation=files))
    assert [one.splits["train"]["documents"] for one in manifests] == [4, 2]
    assert manifests[0].hash != manifests[1].hash


def test_chats_are_filtered_with_their_masks(tmp_path: Path, tokenizer_folder: Path):
    chats = [conversation(i, 1 + i % 3) for i in range(40)]
    once = write_jsonl(tmp_path / "once.jsonl", "messages", chats)
    twice = write_jsonl(tmp_path / "twice.jsonl", "messages", [chat for chat in chats for _ in range(2)])
    keep = dataset("chat", validation_fraction=0.1)
    single = make_shards(tmp_path / "single", tokenizer_folder, [once], keep)
    deduplicated = dataset("chat", validation_fraction=0.1, deduplicate="exact")
    double = make_shards(tmp_path / "double", tokenizer_folder, [twice], deduplicated)
    for split in single.splits:
        totals = [
            {key: manifest.splits[split][key] for key in ("documents", "tokens", "loss_tokens")}
            for manifest in (single, double)
        ]
        assert totals[0] == totals[1]
    assert single.unigram_entropy_nats == double.unigram_entropy_nats
    samples = [Samples.open(manifest, "train", "sft", 64, 0, tmp_path) for manifest in (single, double)]
    assert len(samples[0]) == len(samples[1])
    for index in range(len(samples[0])):
        for ours, expected in zip(samples[0][index], samples[1][index], strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_entropy_is_of_the_documents_that_stay(tmp_path: Path, tokenizer_folder: Path):
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", [text(i % 7) for i in range(20)])
    manifest = make_shards(tmp_path, tokenizer_folder, [corpus], dataset(deduplicate="exact", validation_fraction=0))
    reader = SplitReader(Path(manifest.path), manifest.splits["train"], with_mask=False)
    counts = np.bincount(reader.tokens(0, reader.token_count))
    assert manifest.unigram_entropy_nats == pytest.approx(entropy(counts), abs=1e-12)


def test_a_dataset_of_only_evaluation_texts_is_refused_until_the_remedy_is_followed(
    tmp_path: Path, tokenizer_folder: Path
):
    against, files = evaluation(tmp_path, [QUESTION])
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", [QUESTION])
    with pytest.raises(UserError, match=r"no document stays \(\{'contaminated': 1\}\)"):
        make_shards(tmp_path, tokenizer_folder, [corpus], dataset(decontaminate=against), evaluation=files)
    more = write_jsonl(tmp_path / "b.jsonl", "text", [text(1), text(2)])
    assert make_shards(
        tmp_path / "more", tokenizer_folder, [corpus, more], dataset(decontaminate=against), evaluation=files
    )
    assert make_shards(tmp_path / "without", tokenizer_folder, [corpus], dataset())


def test_errors_in_evaluation_files_have_a_location_until_the_column_is_named(tmp_path: Path, tokenizer_folder: Path):
    path = tmp_path / "evaluation.jsonl"
    corpus = write_jsonl(tmp_path / "a.jsonl", "text", [QUESTION])
    settings = dataset(decontaminate={"files": (str(path),)})
    for line, expected in (
        ('{"question": "x"}', "evaluation.jsonl:1: no column 'text'"),
        ('{"text": 3}', "text is int"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=expected):
            make_shards(tmp_path, tokenizer_folder, [corpus], settings, evaluation=[path])
    path.write_text('{"text": 3, "question": "One question."}\n')
    named = dataset(decontaminate={"files": (str(path),), "columns": ("question",)})
    assert make_shards(tmp_path, tokenizer_folder, [corpus], named, evaluation=[path])


def test_letters_are_words_in_scripts_without_spaces():
    assert split_words("It's 北京, naïve!") == ["it", "s", "北", "京", "naïve"]


def test_vowel_signs_belong_to_their_word():
    """`\\w` of Python's re leaves them out: different words of Hindi became the same letters."""
    assert split_words("नमस्ते दुनिया, தமிழ்") == ["नमस्ते", "दुनिया", "தமிழ்"]


@pytest.mark.parametrize("written", ["étude final abc", "e\u0301tude ﬁnal ＡＢＣ", "ÉTUDE — final (abc)"])
def test_words_that_unicode_writes_otherwise_are_equal(written: str):
    assert split_words(written) == ["étude", "final", "abc"]
    assert list(ngrams(["a", "b", "c"], 2)) == [("a", "b"), ("b", "c")] and list(ngrams(["a"], 2)) == []


def test_a_mixture_refuses_filters_of_its_own():
    with pytest.raises(
        ValueError, match="deduplicate exact has no effect on a mixture; set it on the datasets that are mixed"
    ):
        dataset(files=(), mixture={"a": 1.0}, deduplicate="exact")
