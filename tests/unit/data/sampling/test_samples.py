"""Samples by number: the stream covered once, packs of whole conversations, an order that needs no state."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longhaul.artifacts.files import read_json
from longhaul.artifacts.schemas import DataManifest, TokenizerManifest
from longhaul.data.sampling.packing import Packs, best_fit, make_packs, pack_block
from longhaul.data.sampling.permutation import permutation
from longhaul.data.sampling.samples import IGNORED_LABEL, OPENING_TOKENS, Mixed, Sample, Samples, batch_of_step
from longhaul.data.shards.indexed_dataset import SplitReader
from longhaul.errors import UserError
from tests.support.corpora import conversation

S = 64


def windows(manifest: DataManifest, tmp_path: Path, length: int = S, seed: int = 1) -> Samples:
    return Samples.open(manifest, "train", "pretrain", length, seed, tmp_path)


def packs(manifest: DataManifest, tmp_path: Path, length: int = 128, seed: int = 1) -> Samples:
    return Samples.open(manifest, "train", "sft", length, seed, tmp_path)


def reader(manifest: DataManifest) -> SplitReader:
    return SplitReader(Path(manifest.path), manifest.splits["train"], with_mask=manifest.kind == "chat")


@given(st.integers(1, 3000), st.integers(0, 2**31 - 1), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_a_permutation_covers_each_index_once(size: int, seed: int, epoch: int):
    assert sorted(permutation(seed, epoch, np.arange(size), size)) == list(range(size))


def test_permutations_differ_by_seed_and_epoch_and_need_no_neighbour():
    size = 10**12
    index = np.array([0, 1, size - 1])
    orders = {tuple(permutation(seed, epoch, index, size)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert permutation(1, 2, np.array([size - 1]), size)[0] == permutation(1, 2, index, size)[2]
    with pytest.raises(IndexError):
        permutation(0, 0, np.array([5]), 5)


def test_every_token_but_the_first_is_a_label_once(text_shards: DataManifest, tmp_path: Path):
    samples = windows(text_shards, tmp_path)
    stream = reader(text_shards).tokens(0, reader(text_shards).token_count)
    labels = np.concatenate([samples[index].labels for index in range(len(samples))])
    assert labels[labels != IGNORED_LABEL].tolist() == stream[1:].tolist()
    assert (labels == IGNORED_LABEL).sum() == len(samples) * S - (len(stream) - 1)
    for index in (0, 1, len(samples) - 2):
        sample = samples[index]
        assert sample.input_ids.tolist() == stream[index * S : index * S + S].tolist()
        assert sample.position_ids.tolist() == list(range(S))


@pytest.mark.parametrize("open_samples", [windows, packs])
def test_an_epoch_holds_every_sample_once_and_batches_follow_each_other(
    text_shards: DataManifest, chat_shards: DataManifest, tmp_path: Path, open_samples
):
    samples = open_samples(text_shards if open_samples is windows else chat_shards, tmp_path)
    size = len(samples)
    row = np.concatenate([samples.ids(batch, 7) for batch in range(-(-3 * size // 7))])
    for epoch in range(3):
        assert sorted(row[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert row[:size].tolist() != row[size : 2 * size].tolist(), "epochs are shuffled anew"
    wide = np.concatenate([samples.ids(batch, 21) for batch in range(-(-size // 21))])
    assert wide.tolist() == row[: len(wide)].tolist(), "the order does not depend on the batch size"


def test_openings_of_texts_are_the_first_tokens_of_documents(text_shards: DataManifest, tmp_path: Path):
    documents = reader(text_shards)
    openings = list(windows(text_shards, tmp_path).openings())
    assert len(openings) == documents.document_count
    for number, opening in enumerate(openings):
        tokens = documents.document(number)[0].tolist()
        assert list(opening) == tokens[: len(opening)] and len(opening) == min(OPENING_TOKENS, -(-len(tokens) // 2))
    assert max(map(len, windows(text_shards, tmp_path, length=8).openings())) == 7


def test_openings_of_chats_are_questions_up_to_where_the_answer_begins(
    chat_shards: DataManifest, tokenizer_folder: Path, tmp_path: Path
):
    from transformers import AutoTokenizer

    path = TokenizerManifest.read(tokenizer_folder / "tokenizer.json").path
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    found = {tokenizer.decode(opening) for opening in packs(chat_shards, tmp_path, length=512).openings()}
    asked = {
        tokenizer.apply_chat_template(conversation(number)[:2], tokenize=False, add_generation_prompt=True)
        for number in range(200)
    }
    assert len(found) > 150 and found <= asked
    assert not list(packs(chat_shards, tmp_path, length=8).openings()), "no question fits eight tokens"


def test_openings_of_a_mixture_take_turns(text_shards: DataManifest, tmp_path: Path):
    parts = [windows(text_shards, tmp_path, length) for length in (8, S)]
    first, second = (list(part.openings()) for part in parts)
    assert list(Mixed(parts, [3, 1]).openings())[:4] == [first[0], second[0], first[1], second[1]]


def test_order_is_a_function_of_the_seed(text_shards: DataManifest, tmp_path: Path):
    first, same, other = (windows(text_shards, tmp_path, seed=seed).ids(0, 32).tolist() for seed in (1, 1, 2))
    assert first == same != other


def test_skipped_batches_are_stepped_over():
    assert [batch_of_step(step, [2, 3, 7]) for step in range(7)] == [0, 1, 4, 5, 6, 8, 9]
    assert [batch_of_step(step, []) for step in range(3)] == [0, 1, 2]


def test_conversations_stay_whole_and_see_only_their_own_positions(chat_shards: DataManifest, tmp_path: Path):
    source = reader(chat_shards)
    samples = packs(chat_shards, tmp_path, length=int(source.lengths().max()))
    seen = []
    for index in range(len(samples)):
        sample = samples[index]
        starts = np.flatnonzero(sample.position_ids == 0).tolist()
        for start, stop in zip(starts, [*starts[1:], len(sample.input_ids)], strict=True):
            assert sample.position_ids[start:stop].tolist() == list(range(stop - start))
            if (sample.labels[start:stop] != IGNORED_LABEL).any():
                seen.append((tuple(sample.input_ids[start:stop]), tuple(sample.labels[start:stop])))
    expected = []
    for number in range(len(source.lengths())):
        tokens, mask = (array.astype(np.int64) for array in source.document(number))
        labels = [*np.where(mask[1:] == 1, tokens[1:], IGNORED_LABEL), IGNORED_LABEL]
        expected.append((tuple(tokens), tuple(labels)))
    assert sorted(seen) == sorted(expected)


def test_a_conversation_longer_than_a_sequence_is_cut_and_counted(chat_shards: DataManifest, tmp_path: Path):
    samples = packs(chat_shards, tmp_path, length=48)
    longer = int((reader(chat_shards).lengths() > 48).sum())
    assert samples.cut_documents == longer > 0
    assert all(len(samples[index].input_ids) == 48 for index in range(len(samples)))


def test_a_pack_file_is_made_once_and_another_seed_has_another(chat_shards: DataManifest, tmp_path: Path):
    packs(chat_shards, tmp_path)
    (path,) = tmp_path.glob("*.bin")
    written = path.stat().st_mtime_ns
    packs(chat_shards, tmp_path)
    assert path.stat().st_mtime_ns == written
    assert path.stat().st_size <= 8 * len(reader(chat_shards).lengths())
    packs(chat_shards, tmp_path, seed=2)
    assert len(list(tmp_path.glob("*.bin"))) == 2
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="is not a pack file of"):
        packs(chat_shards, tmp_path)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 50))
@settings(max_examples=80, deadline=None)
def test_packs_hold_every_document_once_and_never_too_many_tokens(lengths: list[int], capacity: int):
    array = np.array(lengths, dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        make_packs(array, capacity, 3, Path(folder) / "packs")
        made = Packs(Path(folder) / "packs", len(lengths))
        found = [made[index].tolist() for index in range(len(made))]
    assert sorted(number for pack in found for number in pack) == list(range(len(lengths)))
    sizes = [sum(min(lengths[number], capacity) for number in pack) for pack in found]
    assert max(sizes) <= capacity
    assert sum(2 * size <= capacity for size in sizes) <= 1, "two half-empty packs would have been one"


@given(st.lists(st.integers(1, 20), max_size=60))
@settings(max_examples=200, deadline=None)
def test_best_fit_is_best_fit(lengths: list[int]):
    """Beside the plain definition."""
    rooms: list[int] = []
    order: list[int] = []  # bins, the one that was touched last at the end
    expected = []
    for length in lengths:
        fitting = [index for index in order if rooms[index] >= length]
        if fitting and any(rooms[index] for index in fitting):
            tightest = min(rooms[index] for index in fitting)
            place = [index for index in fitting if rooms[index] == tightest][-1]
            order.remove(place)
        else:
            place = len(rooms)
            rooms.append(20)
        order.append(place)
        rooms[place] -= length
        expected.append(place)
    assert best_fit(lengths, 20) == expected


def test_blocks_are_packed_from_their_own_documents_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("longhaul.data.sampling.packing.BLOCK_DOCUMENTS", 100)
    lengths = np.random.default_rng(1).integers(1, 700, 350)
    make_packs(lengths, 1000, 3, tmp_path / "packs")
    whole = Packs(tmp_path / "packs", len(lengths))
    found = np.concatenate([whole[index] for index in range(len(whole))])
    alone = [pack_block(lengths, 1000, 3, first) for first in (300, 100, 0, 200)]
    blocks = [alone[2], alone[1], alone[3], alone[0]]
    assert found.tolist() == np.concatenate([documents for documents, _ in blocks]).tolist()
    assert len(whole) == sum(len(sizes) for _, sizes in blocks)


def test_padding_share_is_what_the_packs_leave_empty(chat_shards: DataManifest, tmp_path: Path):
    samples = packs(chat_shards, tmp_path, length=512)
    lengths = np.minimum(reader(chat_shards).lengths(), 512)
    assert samples.padding_share == pytest.approx(1 - lengths.sum() / (512 * len(samples)))
    assert samples.padding_share < 0.1
    (record,) = tmp_path.glob("pack-*.json")
    assert read_json(record) == {
        "documents": len(lengths),
        "packs": len(samples),
        "sequence_length": 512,
        "tokens": int(lengths.sum()),
        "cut_documents": 0,
        "padding_share": samples.padding_share,
    }


def test_packs_are_opened_without_a_look_at_every_document(
    chat_shards: DataManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = packs(chat_shards, tmp_path)
    monkeypatch.setattr(SplitReader, "lengths", lambda self: pytest.fail("all lengths were read"))
    again = packs(chat_shards, tmp_path)
    assert (len(again), again.padding_share) == (len(made), made.padding_share)


@pytest.mark.parametrize("kind", ["windows", "packs"])
def test_samples_are_written_into_rows_of_a_batch(
    text_shards: DataManifest, chat_shards: DataManifest, tmp_path: Path, kind: str
):
    """Whatever lay there before; the last window is shorter than a sequence."""
    samples = windows(text_shards, tmp_path) if kind == "windows" else packs(chat_shards, tmp_path)
    batch = np.full((3, len(samples), samples.length), 7, dtype=np.int64)
    for index in range(len(samples)):
        samples.fill(index, Sample(*batch[:, index]))
        for row, alone in zip(batch[:, index], samples[index], strict=True):
            np.testing.assert_array_equal(row, alone)


def test_a_manifest_of_a_billion_samples_opens_without_its_shards(tmp_path: Path):
    """The shards are not even there: nothing is opened before it is read, and the order needs no memory."""
    shard = {"tokens": 64_000_000, "documents": 50_000, "sha256": {}}
    entry = {"shards": [{**shard, "prefix": f"{i:016x}/train-00000"} for i in range(64_000)]}
    split = {**entry, "tokens": 64_000 * shard["tokens"], "documents": 64_000 * 50_000, "loss_tokens": 0}
    manifest = DataManifest("c", "text", str(tmp_path), "h", "t", "int32", {"train": split}, [], {}, 0.0)
    samples = windows(manifest, tmp_path, length=4096)
    assert len(samples) == 10**9
    assert len(set(samples.ids(10**6, 64).tolist())) == 64
    with pytest.raises(UserError, match=r"train-00000\.idx"):
        samples[0]


def test_what_cannot_be_trained_on_is_refused(text_shards: DataManifest, chat_shards: DataManifest, tmp_path: Path):
    with pytest.raises(UserError, match="an sft stage needs chats, dataset corpus is text"):
        packs(text_shards, tmp_path)
    with pytest.raises(IndexError):
        windows(text_shards, tmp_path)[10**9]
