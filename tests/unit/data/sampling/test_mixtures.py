"""Mixtures: exact proportions over every prefix, every dataset through its own epochs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longhaul.artifacts.schemas import DataManifest
from longhaul.config.mixture_weights import whole_weights
from longhaul.data.sampling.mixtures import Order
from longhaul.data.sampling.samples import Samples
from longhaul.data.shards import tokenize_dataset as tokenize
from tests.support.corpora import dataset, make_shards, text, tokenize_job, write_jsonl


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_no_prefix_strays_by_more_than_one_sample(weights: list[int]):
    places = np.arange(3 * sum(weights))
    parts, numbers = Order(weights)(places)
    for part, weight in enumerate(weights):
        counts = np.cumsum(parts == part)
        assert np.abs(counts - weight * (places + 1) / sum(weights)).max() <= 1 + 1e-9
        assert numbers[parts == part].tolist() == list(range(int(counts[-1])))


def test_any_place_is_known_alone():
    order = Order([7, 2, 1])
    far = np.array([10**15 + 3, 5])
    parts, numbers = order(far)
    near = order(np.arange(10))
    assert parts[0] == near[0][3] and parts[1] == near[0][5]
    assert numbers[0] == 10**14 * [7, 2, 1][parts[0]] + near[1][3]


def test_weights_are_read_as_written():
    assert whole_weights({"a": 0.7, "b": 0.2, "c": 0.1}) == {"a": 7, "b": 2, "c": 1}
    assert whole_weights({"a": 3, "b": 1.5}) == {"a": 2, "b": 1}
    with pytest.raises(ValueError, match="repeat after 1,000,001 samples"):
        whole_weights({"a": 1, "b": 1e-6})


@pytest.fixture(scope="module")
def mixed(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DataManifest:
    """Three parts of a large dataset to one of a small one."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, count in (("large", 300), ("small", 30)):
        (folder / name).mkdir()
        corpus = write_jsonl(folder / f"{name}.jsonl", "text", (f"{name} {text(i)}" for i in range(count)))
        make_shards(folder / name, tokenizer_folder, [corpus], dataset(validation_fraction=0.1))
    parts = {name: str(folder / name / "data.json") for name in ("large", "small")}
    job = tokenize_job(folder, tokenizer_folder, [], dataset(files=(), mixture={"large": 0.75, "small": 0.25}))
    tokenize.run(job.model_copy(update={"parts": parts}))
    return DataManifest.read(Path(job.out))


def test_samples_come_in_proportion_and_small_datasets_begin_anew(mixed: DataManifest, tmp_path: Path):
    samples = Samples.open(mixed, "train", "pretrain", 64, 1, tmp_path)
    parts = [Samples.open(DataManifest(**p["manifest"]), "train", "pretrain", 64, 1, tmp_path) for p in mixed.mixture]
    rounds = 3 * len(parts[1])
    ids = np.concatenate([samples.ids(batch, 4) for batch in range(rounds)])
    assert Counter((ids % 2).tolist()) == {0: 3 * rounds, 1: rounds}
    assert Counter((ids[ids % 2 == 1] // 2).tolist()) == dict.fromkeys(range(len(parts[1])), 3)
    assert ids.tolist() == np.concatenate([samples.ids(batch, 12) for batch in range(rounds // 3)]).tolist()
    for index in ids[:8].tolist():
        assert samples[index].input_ids.tolist() == parts[index % 2][index // 2].input_ids.tolist()


def test_validation_reads_all_parts(mixed: DataManifest, tmp_path: Path):
    held_out = Samples.open(mixed, "validation", "pretrain", 64, 1, tmp_path)
    assert len(held_out) >= 2 and held_out[0].input_ids.tolist() != held_out[1].input_ids.tolist()
    assert mixed.splits["validation"]["documents"] == sum(
        part["manifest"]["splits"]["validation"]["documents"] for part in mixed.mixture
    )
