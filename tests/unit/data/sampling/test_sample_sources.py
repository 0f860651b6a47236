"""Windows and packs of a few known tokens, compared with samples written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longhaul.artifacts.atomic_files import file_sha256, read_json
from longhaul.data.sampling.pack_conversations import PackFile, write_pack_file
from longhaul.data.sampling.sample_format import Sample, clear_sample, is_text
from longhaul.data.sampling.sample_sources import PackSource, Truncate, WindowSource
from longhaul.data.sampling.samples import MixedSamples, Samples
from longhaul.errors import UserError

PAD, PROMPT_TOKENS = 99, 24


class Documents:
    """Documents in memory, with the interface of SplitReader."""

    def __init__(self, *documents: list[int], masks: list[list[int]] | None = None) -> None:
        self._documents = [np.array(document, dtype=np.uint16) for document in documents]
        ones = [[1] * len(document) for document in documents]
        self._masks = [np.array(mask, dtype=np.uint8) for mask in masks or ones]
        self.document_count = len(documents)
        self.token_count = sum(map(len, documents))
        self.loss_token_count = sum(int(mask.sum()) for mask in self._masks)

    def lengths(self) -> np.ndarray:
        return np.array([len(document) for document in self._documents], dtype=np.int32)

    def read_into(self, out: np.ndarray, start: int) -> None:
        assert start + len(out) <= self.token_count
        out[:] = np.concatenate(self._documents)[start : start + len(out)]

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return self._documents[number], self._masks[number]


def numbered(count: int) -> Documents:
    """Return one document with the tokens 1 to count."""
    return Documents(list(range(1, count + 1)))


def filled(source: Any, index: int) -> Sample:
    sample = Sample(*np.full((3, source.length), -7, dtype=np.int64))
    tokens = source.fill(index, sample)
    assert sample.input_ids[tokens:].tolist() == [PAD] * (source.length - tokens), (
        "the number of tokens without padding"
    )
    assert PAD not in sample.input_ids[:tokens]
    return sample


def lists(sample: Sample) -> tuple[list[int], ...]:
    return tuple(part.tolist() for part in sample)


def test_cleared_sample_is_padding_without_labels():
    sample = Sample(*np.zeros((3, 4), dtype=np.int64))
    clear_sample(sample, PAD)
    assert lists(sample) == ([PAD] * 4, [-100] * 4, [0, 1, 2, 3])


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (2, 1), (5, 1), (6, 2), (9, 2), (10, 3)])
def test_windows_cover_every_label(tokens: int, windows: int):
    assert len(WindowSource(numbered(tokens), 4, PAD)) == windows  # type: ignore[arg-type]


def test_window_reads_one_token_more_than_it_holds():
    source = WindowSource(numbered(10), 4, PAD)  # type: ignore[arg-type]
    assert (source.length, source.token_count, source.totals) == (4, 10, None)
    assert lists(filled(source, 0)) == ([1, 2, 3, 4], [2, 3, 4, 5], [0, 1, 2, 3])
    assert lists(filled(source, 1)) == ([5, 6, 7, 8], [6, 7, 8, 9], [0, 1, 2, 3])
    assert lists(filled(source, 2)) == ([9, 10, PAD, PAD], [10, -100, -100, -100], [-6, -5, -4, -3])


@pytest.mark.parametrize("tokens", range(2, 6))
def test_positions_tell_the_padding_of_the_last_window_and_do_not_split_it(tokens: int):
    """Attention sees one document, so that it needs no mask."""
    sample = filled(WindowSource(numbered(tokens), 4, PAD), 0)  # type: ignore[arg-type]
    assert is_text(sample.position_ids, 4).tolist() == [place < tokens for place in range(4)]
    assert np.diff(sample.position_ids).tolist() == [1, 1, 1]


def test_openings_of_windows_are_at_most_half_a_document_and_shorter_than_a_sequence():
    documents = Documents([1], [1, 2], [1, 2, 3], list(range(60)), [])
    openings = list(WindowSource(documents, 64, PAD).openings(PROMPT_TOKENS))  # type: ignore[arg-type]
    assert openings == [(1,), (1,), (1, 2), tuple(range(24))]
    assert list(WindowSource(documents, 8, PAD).openings(PROMPT_TOKENS))[-1] == tuple(range(7))  # type: ignore[arg-type]


CHATS = Documents([1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11, 12, 13, 14], masks=[[0, 0, 1, 1], [0, 1, 0], [0] * 6 + [1]])


def pack_source(
    folder: Path, documents: Documents = CHATS, length: int = 7, truncate: Truncate = "right"
) -> PackSource:
    return PackSource(documents, length, PAD, 1, folder / "packs.bin", truncate)  # type: ignore[arg-type]


def cut_documents(source: PackSource) -> int:
    assert source.totals
    return source.totals["cut_documents"]


def test_packs_hold_conversations_with_labels_and_positions_of_their_own(tmp_path: Path):
    source = pack_source(tmp_path)
    samples = sorted(lists(filled(source, index)) for index in range(len(source)))
    first = ([1, 2, 3, 4], [-100, 3, 4, -100], [0, 1, 2, 3])
    second = ([5, 6, 7], [6, -100, -100], [0, 1, 2])
    alone = ([8, 9, 10, 11, 12, 13, 14], [-100] * 5 + [14, -100], list(range(7)))
    together = tuple(a + b for a, b in zip(first, second, strict=True))
    swapped = tuple(b + a for a, b in zip(first, second, strict=True))
    assert samples in (sorted([alone, together]), sorted([alone, swapped]))
    assert (source.token_count, cut_documents(source), source.length) == (14, 0, 7)


def test_positions_of_the_padding_are_negative(tmp_path: Path):
    source = pack_source(tmp_path, Documents([1, 2, 3], masks=[[0, 1, 1]]), length=5)
    assert lists(filled(source, 0)) == ([1, 2, 3, PAD, PAD], [2, 3, -100, -100, -100], [0, 1, 2, -2, -1])


def test_long_conversation_is_truncated(tmp_path: Path):
    source = pack_source(tmp_path, Documents([1, 2, 3, 4, 5], masks=[[0, 0, 1, 1, 1]]), length=4)
    assert lists(filled(source, 0)) == ([1, 2, 3, 4], [-100, 3, 4, -100], [0, 1, 2, 3])
    assert (source.token_count, cut_documents(source)) == (4, 1)


def test_long_conversation_keeps_its_last_tokens(tmp_path: Path):
    documents = Documents([1, 2, 3, 4, 5, 6], masks=[[0, 1, 1, 0, 0, 1]])
    source = pack_source(tmp_path, documents, length=4, truncate="left")
    assert lists(filled(source, 0)) == ([3, 4, 5, 6], [-100, -100, 6, -100], [0, 1, 2, 3])
    assert (source.token_count, cut_documents(source)) == (4, 1)


def test_long_conversations_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    documents = Documents([1, 2, 3, 4, 5], [6, 7, 8, 9], masks=[[0, 1, 1, 1, 1], [0, 0, 0, 1]])
    source = pack_source(tmp_path, documents, length=4, truncate="drop")
    assert [lists(filled(source, index)) for index in range(len(source))] == [
        ([6, 7, 8, 9], [-100, -100, 9, -100], [0, 1, 2, 3])
    ]
    assert (source.token_count, cut_documents(source)) == (4, 0)
    assert "left out 1 conversations longer than 4 tokens (truncate: drop)\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("truncate", "mask", "packs"),
    [
        ("right", [0, 0, 0, 1, 1, 1], 1),
        ("right", [1, 0, 0, 0, 1, 1], 0),  # no position predicts the first token
        ("left", [1, 1, 0, 0, 0, 1], 1),
        ("left", [1, 1, 1, 0, 0, 0], 0),
    ],
)
def test_conversations_without_loss_in_the_kept_tokens_are_left_out(
    tmp_path: Path, truncate: Truncate, mask: list[int], packs: int
):
    source = pack_source(tmp_path, Documents([1, 2, 3, 4, 5, 6], masks=[mask]), length=4, truncate=truncate)
    assert len(source) == packs
    assert read_json(tmp_path / "packs.json")["documents_without_loss"] == 1 - packs


@pytest.mark.parametrize(("truncate", "cut"), [("right", 3), ("left", 1), ("drop", 4)])
def test_loss_tokens_that_no_sequence_keeps_are_counted(tmp_path: Path, truncate: Truncate, cut: int):
    """The long conversation has the loss tokens 2, 5, 6 and 7; its kept tokens are 1 to 4, or 4 to 7."""
    documents = Documents([1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11], masks=[[0, 1, 0, 0, 1, 1, 1], [0, 0, 0, 1]])
    pack_source(tmp_path, documents, length=4, truncate=truncate)
    found = read_json(tmp_path / "packs.json")
    assert (found["loss_tokens"], found["cut_loss_tokens"]) == (5, cut)


def test_split_without_documents_has_no_pack_and_no_file(tmp_path: Path):
    source = pack_source(tmp_path, Documents())
    assert (len(source), source.token_count, source.totals, list(source.openings(PROMPT_TOKENS))) == (0, 0, None, [])
    assert list(tmp_path.iterdir()) == []


def test_openings_of_packs_end_before_the_first_loss_token(tmp_path: Path):
    assert list(pack_source(tmp_path).openings(PROMPT_TOKENS)) == [(1, 2), (5,), (8, 9, 10, 11, 12, 13)]
    documents = Documents([1, 2, 3], [4, 5, 6], [7, 8, 9, 10], masks=[[1, 0, 0], [0, 0, 0], [0, 0, 0, 1]])
    (tmp_path / "other").mkdir()
    assert list(pack_source(tmp_path / "other", documents, length=3).openings(PROMPT_TOKENS)) == []


def test_writing_packs_prints_and_records_the_totals(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pack_source(tmp_path, Documents([1] * 3, [2] * 9, [3] * 4), length=8)
    output = capsys.readouterr()
    assert (
        output.err == "packed 3 conversations into 2 sequences of 8 tokens: 6.25% padding, 1 conversations truncated, "
        "which cuts 6.25% of the loss tokens\n"
    )
    assert output.out == ""
    assert read_json(tmp_path / "packs.json") == {
        "documents": 3,
        "packs": 2,
        "sequence_length": 8,
        "tokens": 15,
        "cut_documents": 1,
        "dropped_documents": 0,
        "documents_without_loss": 0,
        "loss_tokens": 16,
        "truncate": "right",
        "median_tokens": 4,
        "cut_loss_tokens": 1,
        "padding_share": 1 / 16,
        "sha256": file_sha256(tmp_path / "packs.bin"),
    }
    pack_source(tmp_path, Documents([1] * 3, [2] * 9, [3] * 4), length=8)
    assert capsys.readouterr().err == "", "the existing file is used"
    (tmp_path / "packs.json").unlink()
    pack_source(tmp_path, Documents([1] * 3, [2] * 9, [3] * 4), length=8)
    assert (tmp_path / "packs.json").exists(), "a pack file without its record is written again"


def test_totals_of_an_existing_pack_file_come_from_its_record(tmp_path: Path):
    pack_source(tmp_path)
    record = tmp_path / "packs.json"
    record.write_text(record.read_text().replace('"tokens": 14', '"tokens": 15'))
    assert pack_source(tmp_path).token_count == 15


def test_pack_file_has_documents_then_ends(tmp_path: Path):
    """Three documents of 3 + 2 and 4 tokens: two packs of at most 5 tokens."""
    write_pack_file(np.array([3, 4, 2], dtype=np.int32), 5, 1, tmp_path / "packs")
    numbers = np.fromfile(tmp_path / "packs", dtype="<u4").tolist()
    assert sorted(numbers[:3]) == [0, 1, 2] and numbers[3:] in ([1, 3], [2, 3])
    packs = PackFile(tmp_path / "packs", 3)
    assert sorted(sorted(packs[index].tolist()) for index in range(len(packs))) == [[0, 2], [1]]


@pytest.mark.parametrize("document_count", [2, 4, 5])
def test_pack_file_of_other_documents_is_refused(tmp_path: Path, document_count: int):
    write_pack_file(np.array([3, 4, 2], dtype=np.int32), 5, 1, tmp_path / "packs")
    with pytest.raises(UserError) as refused:
        PackFile(tmp_path / "packs", document_count)
    assert refused.value.message == f"{tmp_path}/packs is not a pack file of {document_count} documents"
    assert refused.value.hint == "delete it and run again"


def samples_of(documents: Documents, length: int, seed: int = 1) -> Samples:
    return Samples(WindowSource(documents, length, PAD), seed, "prose")  # type: ignore[arg-type]


def test_samples_of_a_source_are_numbered_from_0():
    samples = samples_of(numbered(10), 4)
    assert (len(samples), samples.length, samples.pack_totals, samples.padding_share) == (3, 4, [], 1 - 10 / 12)
    assert samples[0].input_ids.tolist() == [1, 2, 3, 4]
    assert samples[2].input_ids.tolist() == [9, 10, PAD, PAD]
    for index in (-1, 3):
        with pytest.raises(IndexError) as refused:
            samples.fill(index, samples[0])
        assert str(refused.value) == f"sample {index} is outside 0..2"
    assert samples_of(Documents(), 4).padding_share == 0.0


def test_mixed_samples_alternate_and_repeat_small_datasets():
    large, small = samples_of(numbered(14), 4), samples_of(Documents([51, 52, 53, 54, 55, 56]), 4)
    mixed = MixedSamples([large, small], [3, 1])
    assert (len(large), len(small), len(mixed), mixed.length, mixed.pack_totals) == (4, 2, 8, 4, [])
    assert [int(mixed[index].input_ids[0]) for index in range(8)] == [1, 51, 5, 55, 9, 51, 13, 55]
    assert mixed.padding_share == pytest.approx(((1 - 14 / 16) * 4 + (1 - 6 / 8) * 2) / 6)
    assert list(mixed.openings(PROMPT_TOKENS)) == [(1, 2, 3), (51, 52, 53)]
    assert mixed.ids(0, 4).dtype == np.int64
    # positions 4 to 7 of the mixture: samples 3, 4 and 5 of the large dataset, and 1 of the small one
    expected = [*(2 * large.at(np.array([3, 4]))).tolist(), 2 * int(small.at(np.array([1]))[0]) + 1]
    assert mixed.ids(1, 4).tolist() == [*expected, 2 * int(large.at(np.array([5]))[0])]


def test_batches_are_consecutive_parts_of_all_epochs():
    samples = samples_of(numbered(14), 4)
    assert samples.ids(1, 3).tolist() == samples.at(np.array([3, 4, 5])).tolist()
    both = samples.at(np.arange(8)).tolist()
    assert sorted(both[:4]) == sorted(both[4:]) == [0, 1, 2, 3] and both[:4] != both[4:]


def test_packs_depend_on_the_seed(tmp_path: Path):
    """Eight documents of one length, two in each pack. The seed decides which ones share a pack."""
    documents = Documents(*([number] * 4 for number in range(8)))
    lengths = documents.lengths()
    for seed in (1, 2):
        PackSource(documents, 8, PAD, seed, tmp_path / f"{seed}.bin")  # type: ignore[arg-type]
        write_pack_file(lengths, 8, seed, tmp_path / "expected")
        assert (tmp_path / f"{seed}.bin").read_bytes() == (tmp_path / "expected").read_bytes()
    assert (tmp_path / "1.bin").read_bytes() != (tmp_path / "2.bin").read_bytes()


def test_sample_arrays_are_int64():
    sample = samples_of(numbered(10), 4)[0]
    assert {part.dtype for part in sample} == {np.dtype(np.int64)}
