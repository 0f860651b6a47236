"""Samples by number: windows cover the stream once, packs hold whole conversations, and the order needs no state."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longhaul.artifacts.artifact_schemas import DataManifest, TokenizerManifest
from longhaul.artifacts.atomic_files import file_sha256, read_json
from longhaul.data.sampling.pack_conversations import PackFile, best_fit, pack_block, write_pack_file
from longhaul.data.sampling.permutation import permutation
from longhaul.data.sampling.sample_format import IGNORED_LABEL, Sample
from longhaul.data.sampling.samples import MixedSamples, Samples, batch_of_step
from longhaul.data.shards.shard_reader import SplitReader
from longhaul.errors import UserError
from tests.support.corpora import conversation, dataset, make_shards, write_jsonl

S, PROMPT_TOKENS = 64, 24


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


def test_permutations_depend_on_seed_and_epoch_and_each_index_is_computed_alone():
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
def test_an_epoch_holds_every_sample_once_for_any_batch_size(
    text_shards: DataManifest, chat_shards: DataManifest, tmp_path: Path, open_samples
):
    samples = open_samples(text_shards if open_samples is windows else chat_shards, tmp_path)
    size = len(samples)
    ids = np.concatenate([samples.ids(batch, 7) for batch in range(-(-3 * size // 7))])
    for epoch in range(3):
        assert sorted(ids[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert ids[:size].tolist() != ids[size : 2 * size].tolist(), "each epoch has another order"
    wide = np.concatenate([samples.ids(batch, 21) for batch in range(-(-size // 21))])
    assert wide.tolist() == ids[: len(wide)].tolist(), "the order does not depend on the batch size"


def test_openings_of_texts_are_the_first_tokens_of_documents(text_shards: DataManifest, tmp_path: Path):
    documents = reader(text_shards)
    openings = list(windows(text_shards, tmp_path).openings(PROMPT_TOKENS))
    assert len(openings) == documents.document_count
    for number, opening in enumerate(openings):
        tokens = documents.document(number)[0].tolist()
        assert list(opening) == tokens[: len(opening)] and len(opening) == min(PROMPT_TOKENS, -(-len(tokens) // 2))
    assert max(map(len, windows(text_shards, tmp_path, length=8).openings(PROMPT_TOKENS))) == 7


def test_openings_of_chats_end_before_the_answer(chat_shards: DataManifest, tokenizer_folder: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    path = TokenizerManifest.read(tokenizer_folder / "tokenizer.json").path
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    found = {tokenizer.decode(opening) for opening in packs(chat_shards, tmp_path, length=512).openings(PROMPT_TOKENS)}
    questions = {
        tokenizer.apply_chat_template(conversation(number)[:2], tokenize=False, add_generation_prompt=True)
        for number in range(200)
    }
    assert len(found) > 150 and found <= questions
    with pytest.raises(UserError, match="has a loss token within sequence_length 8"):
        packs(chat_shards, tmp_path, length=8)


def test_an_epoch_of_a_mixture_is_one_of_every_dataset(text_shards: DataManifest, tmp_path: Path):
    parts = [windows(text_shards, tmp_path, length) for length in (8, S)]
    mixed = MixedSamples(parts, [3, 1])
    assert mixed.distinct_count == len(parts[0]) + len(parts[1]) == sum(part.distinct_count for part in parts)


def test_openings_of_a_mixture_alternate(text_shards: DataManifest, tmp_path: Path):
    parts = [windows(text_shards, tmp_path, length) for length in (8, S)]
    first, second = (list(part.openings(PROMPT_TOKENS)) for part in parts)
    assert list(MixedSamples(parts, [3, 1]).openings(PROMPT_TOKENS))[:4] == [first[0], second[0], first[1], second[1]]


def test_the_order_depends_on_the_seed_only(text_shards: DataManifest, tmp_path: Path):
    first, same, other = (windows(text_shards, tmp_path, seed=seed).ids(0, 32).tolist() for seed in (1, 1, 2))
    assert first == same != other


def test_skipped_batches_are_not_used():
    assert [batch_of_step(step, [2, 3, 7]) for step in range(7)] == [0, 1, 4, 5, 6, 8, 9]
    assert [batch_of_step(step, []) for step in range(3)] == [0, 1, 2]


def test_packs_hold_whole_conversations_with_their_own_positions(chat_shards: DataManifest, tmp_path: Path):
    source = reader(chat_shards)
    samples = packs(chat_shards, tmp_path, length=int(source.lengths().max()))
    found = []
    for index in range(len(samples)):
        sample = samples[index]
        starts = np.flatnonzero(sample.position_ids == 0).tolist()
        text = int((sample.position_ids >= 0).sum())
        assert sample.position_ids[text:].tolist() == list(range(text - len(sample.position_ids), 0)), "padding"
        for start, stop in zip(starts, [*starts[1:], text], strict=True):
            assert sample.position_ids[start:stop].tolist() == list(range(stop - start))
            found.append((tuple(sample.input_ids[start:stop]), tuple(sample.labels[start:stop])))
    expected = []
    for number in range(len(source.lengths())):
        tokens, mask = (array.astype(np.int64) for array in source.document(number))
        labels = [*np.where(mask[1:] == 1, tokens[1:], IGNORED_LABEL), IGNORED_LABEL]
        expected.append((tuple(tokens), tuple(labels)))
    assert sorted(found) == sorted(expected)


def test_a_conversation_longer_than_a_sequence_is_truncated_and_counted(chat_shards: DataManifest, tmp_path: Path):
    samples = packs(chat_shards, tmp_path, length=96)
    masks = [reader(chat_shards).document(number)[1] for number in range(reader(chat_shards).document_count)]
    (totals,) = samples.pack_totals
    assert totals["cut_documents"] == sum(len(mask) > 96 and mask[1:96].any() for mask in masks) > 0
    assert all(len(samples[index].input_ids) == 96 for index in range(len(samples)))


def _long_prompts(tmp_path: Path, tokenizer_folder: Path, words: list[int]) -> DataManifest:
    """Return the shards of one conversation for each number of words in its prompt."""
    chats = [
        [
            {"role": "user", "content": f"{number} " + "long " * count},
            {"role": "assistant", "content": f"Answer {number}."},
        ]
        for number, count in enumerate(words)
    ]
    corpus = write_jsonl(tmp_path / "a.jsonl", "messages", chats)
    return make_shards(tmp_path, tokenizer_folder, [corpus], dataset("chat", validation_fraction=0))


def test_conversations_whose_answers_begin_behind_the_sequence_are_left_out(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
):
    manifest = _long_prompts(tmp_path, tokenizer_folder, [300, 1, 300, 2, 3])
    samples = packs(manifest, tmp_path, length=64)
    assert all((samples[index].labels != IGNORED_LABEL).any() for index in range(len(samples)))
    in_loss = sum(int((samples[index].labels != IGNORED_LABEL).sum()) for index in range(len(samples)))
    masks = [reader(manifest).document(number)[1] for number in (1, 3, 4)]
    assert in_loss == sum(int(mask.sum()) for mask in masks)
    (record,) = tmp_path.glob("pack-*.json")
    totals = read_json(record)
    assert (totals["documents"], totals["documents_without_loss"], totals["cut_documents"]) == (3, 2, 0)
    assert totals["tokens"] == sum(map(len, masks))
    log = capsys.readouterr().err
    assert (
        "left out 2 conversations whose 64 tokens hold no loss token: raise sequence_length, or use another truncate"
        in log
    )


def test_a_split_without_an_answer_within_the_sequence_is_refused(tmp_path: Path, tokenizer_folder: Path):
    manifest = _long_prompts(tmp_path, tokenizer_folder, [300, 301])
    with pytest.raises(
        UserError, match="none of the 2 conversations of the train split has a loss token within"
    ) as caught:
        packs(manifest, tmp_path, length=64)
    assert "raise the stage's sequence_length" in (caught.value.hint or "")
    assert len(packs(manifest, tmp_path, length=4096)) == 1


def test_a_pack_file_is_written_once_per_seed(chat_shards: DataManifest, tmp_path: Path):
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
        write_pack_file(array, capacity, 3, Path(folder) / "packs")
        pack_file = PackFile(Path(folder) / "packs", len(lengths))
        found = [pack_file[index].tolist() for index in range(len(pack_file))]
    assert sorted(number for pack in found for number in pack) == list(range(len(lengths)))
    sizes = [sum(min(lengths[number], capacity) for number in pack) for pack in found]
    assert max(sizes) <= capacity
    assert sum(2 * size <= capacity for size in sizes) <= 1, "two half-empty packs should have been one"


@given(st.lists(st.integers(1, 20), max_size=60))
@settings(max_examples=200, deadline=None)
def test_best_fit_equals_its_plain_definition(lengths: list[int]):
    free: list[int] = []
    order: list[int] = []  # bins; the one that was used last is at the end
    expected = []
    for length in lengths:
        fitting = [index for index in order if free[index] >= length]
        if fitting and any(free[index] for index in fitting):
            tightest = min(free[index] for index in fitting)
            chosen = [index for index in fitting if free[index] == tightest][-1]
            order.remove(chosen)
        else:
            chosen = len(free)
            free.append(20)
        order.append(chosen)
        free[chosen] -= length
        expected.append(chosen)
    assert best_fit(lengths, 20) == expected


def test_blocks_are_packed_from_their_own_documents_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("longhaul.data.sampling.pack_conversations.BLOCK_DOCUMENTS", 100)
    lengths = np.random.default_rng(1).integers(1, 700, 350)
    write_pack_file(lengths, 1000, 3, tmp_path / "packs")
    whole = PackFile(tmp_path / "packs", len(lengths))
    found = np.concatenate([whole[index] for index in range(len(whole))])
    alone = [pack_block(lengths, 1000, 3, first) for first in (300, 100, 0, 200)]
    blocks = [alone[2], alone[1], alone[3], alone[0]]
    assert found.tolist() == np.concatenate([documents for documents, _ in blocks]).tolist()
    assert len(whole) == sum(len(sizes) for _, sizes in blocks)


def test_padding_share_is_the_fraction_of_positions_without_a_token(chat_shards: DataManifest, tmp_path: Path):
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
        "dropped_documents": 0,
        "documents_without_loss": 0,
        "loss_tokens": chat_shards.splits["train"]["loss_tokens"],
        "cut_loss_tokens": 0,
        "truncate": "right",
        "median_tokens": int(np.median(lengths)),
        "padding_share": samples.padding_share,
        "sha256": file_sha256(record.with_suffix(".bin")),
    }


def test_opening_packs_does_not_read_the_lengths_of_documents(
    chat_shards: DataManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = packs(chat_shards, tmp_path)
    monkeypatch.setattr(SplitReader, "lengths", lambda self: pytest.fail("all lengths were read"))
    again = packs(chat_shards, tmp_path)
    assert (len(again), again.padding_share) == (len(first), first.padding_share)


@pytest.mark.parametrize("kind", ["windows", "packs"])
def test_fill_overwrites_rows_of_a_batch(
    text_shards: DataManifest, chat_shards: DataManifest, tmp_path: Path, kind: str
):
    """The rows are not zero before, and the last window is shorter than a sequence."""
    samples = windows(text_shards, tmp_path) if kind == "windows" else packs(chat_shards, tmp_path)
    batch = np.full((3, len(samples), samples.length), 7, dtype=np.int64)
    for index in range(len(samples)):
        samples.fill(index, Sample(*batch[:, index]))
        for row, alone in zip(batch[:, index], samples[index], strict=True):
            np.testing.assert_array_equal(row, alone)


def test_a_manifest_of_a_billion_samples_opens_without_reading_shards(tmp_path: Path):
    """The shards do not exist: a shard is opened when it is first read, and the order needs no memory."""
    shard = {"tokens": 64_000_000, "documents": 50_000, "sha256": {}}
    entry = {"shards": [{**shard, "prefix": f"{i:016x}/train-00000"} for i in range(64_000)]}
    split = {**entry, "tokens": 64_000 * shard["tokens"], "documents": 64_000 * 50_000, "loss_tokens": 0}
    manifest = DataManifest("c", "text", str(tmp_path), "h", "t", "int32", {"train": split}, [], {}, 0.0)
    samples = windows(manifest, tmp_path, length=4096)
    assert len(samples) == 10**9
    assert len(set(samples.ids(10**6, 64).tolist())) == 64
    with pytest.raises(UserError, match=r"train-00000\.idx"):
        samples[0]


def test_texts_for_an_sft_stage_are_refused(text_shards: DataManifest, chat_shards: DataManifest, tmp_path: Path):
    with pytest.raises(UserError, match="an sft stage needs a dataset of chats, but dataset corpus is text"):
        packs(text_shards, tmp_path)
    with pytest.raises(IndexError):
        windows(text_shards, tmp_path)[10**9]


def test_open_passes_padding_split_and_seed_on(text_shards: DataManifest, chat_shards: DataManifest, tmp_path: Path):
    for manifest, kind in ((text_shards, "pretrain"), (chat_shards, "sft")):
        samples = Samples.open(manifest, "validation", kind, 4096, 7, tmp_path, pad_id=5)
        assert samples[len(samples) - 1].input_ids[-1] == 5
        assert Samples.open(manifest, "validation", kind, 4096, 7, tmp_path)[0].input_ids[-1] == 0
    write_pack_file(
        SplitReader(Path(chat_shards.path), chat_shards.splits["train"], True).lengths(), 128, 7, tmp_path / "x"
    )
    packs(chat_shards, tmp_path, seed=7)
    written = tmp_path / f"pack-{chat_shards.hash}-train-128-7-right.bin"
    assert written.read_bytes() == (tmp_path / "x").read_bytes(), "the seed decides the packs"
    assert {path.name for path in tmp_path.glob("*validation*")} == {
        f"pack-{chat_shards.hash}-validation-4096-7-right.{suffix}" for suffix in ("bin", "json")
    }


def test_mixture_opens_its_parts_with_the_same_settings(
    text_shards: DataManifest, tmp_path: Path, chat_shards: DataManifest
):
    for manifest, kind in ((text_shards, "pretrain"), (chat_shards, "sft")):
        fields = dataclasses.asdict(manifest)
        empty = {**fields, "splits": {name: {**split, "documents": 0} for name, split in manifest.splits.items()}}
        parts = [(2, fields), (5, empty), (1, fields)]
        mixture = [{"weight": weight, "manifest": part} for weight, part in parts]
        mixed = Samples.open(
            dataclasses.replace(manifest, mixture=mixture), "validation", kind, 4096, 7, tmp_path, pad_id=5
        )
        alone = Samples.open(manifest, "validation", kind, 4096, 7, tmp_path, pad_id=5)
        assert isinstance(mixed, MixedSamples) and len(mixed) == 2 * len(alone)
        assert mixed[0].input_ids.tolist() == mixed[1].input_ids.tolist() == alone[0].input_ids.tolist()
        assert (mixed.ids(0, 6) % 2).tolist() == [0, 1, 0, 0, 1, 0]
        batch = mixed.ids(0, 3)
        assert (batch[batch % 2 == 0] // 2).tolist() == alone.at(np.arange(2)).tolist()


def test_truncate_holds_in_a_dataset_and_in_a_mixture(tmp_path: Path, tokenizer_folder: Path):
    manifest = _long_prompts(tmp_path, tokenizer_folder, [300, 1])
    mixture = dataclasses.replace(manifest, mixture=[{"weight": 1, "manifest": dataclasses.asdict(manifest)}])
    end_of_first = reader(manifest).document(0)[0][-64:].tolist()
    for opened in (manifest, mixture):
        samples = Samples.open(opened, "train", "sft", 64, 1, tmp_path, truncate="left")
        assert end_of_first in [samples[index].input_ids.tolist() for index in range(len(samples))]
        assert len(samples.pack_totals) == 1


def test_an_invalid_dataset_of_a_mixture_is_refused_with_the_remedy(text_shards: DataManifest, tmp_path: Path):
    mixture = [{"weight": 1, "manifest": {**dataclasses.asdict(text_shards), "dtype": 5}}]
    with pytest.raises(UserError) as refused:
        windows(dataclasses.replace(text_shards, dataset="mixed", mixture=mixture), tmp_path)
    assert refused.value.message.startswith(
        "the manifest of the mixture mixed lists an invalid dataset: `dtype` is 5: "
    )
    assert refused.value.hint == "delete the mixture's manifest; the next run writes it again"


def test_training_split_without_a_sample_is_refused(text_shards: DataManifest, tmp_path: Path):
    entry = {"shards": [], "tokens": 0, "documents": 0, "loss_tokens": 0}
    empty = dataclasses.replace(text_shards, splits={"train": entry, "validation": entry})
    with pytest.raises(UserError) as refused:
        windows(empty, tmp_path)
    assert refused.value.message == "dataset corpus: the train split has 0 tokens, too few for one sample"
    assert refused.value.hint == "add documents"
    assert len(windows(text_shards, tmp_path))
    assert len(Samples.open(empty, "validation", "pretrain", S, 1, tmp_path)) == 0


def test_texts_are_refused_until_a_dataset_of_chats_is_used(
    text_shards: DataManifest, chat_shards: DataManifest, tmp_path: Path
):
    with pytest.raises(UserError) as refused:
        packs(text_shards, tmp_path)
    assert refused.value.hint == "use a dataset of kind chat"
    assert len(packs(chat_shards, tmp_path))
