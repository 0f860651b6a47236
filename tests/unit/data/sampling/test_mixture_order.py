"""Mixtures keep exact proportions in every prefix, and each dataset has its own epochs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.config.mixture_proportions import whole_weights
from longhaul.data.sampling.mixture_order import MixtureOrder
from longhaul.data.sampling.samples import Samples
from longhaul.data.shards import tokenize_dataset
from tests.support.corpora import dataset, text, tokenize_job, write_jsonl


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_every_prefix_keeps_the_proportions_within_one_sample(weights: list[int]):
    positions = np.arange(3 * sum(weights))
    datasets, numbers = MixtureOrder(weights)(positions)
    for dataset_number, weight in enumerate(weights):
        counts = np.cumsum(datasets == dataset_number)
        assert np.abs(counts - weight * (positions + 1) / sum(weights)).max() <= 1 + 1e-9
        assert numbers[datasets == dataset_number].tolist() == list(range(int(counts[-1])))


def test_a_position_is_computed_without_earlier_ones():
    order = MixtureOrder([7, 2, 1])
    far = np.array([10**15 + 3, 5])
    datasets, numbers = order(far)
    near = order(np.arange(10))
    assert datasets[0] == near[0][3] and datasets[1] == near[0][5]
    assert numbers[0] == 10**14 * [7, 2, 1][datasets[0]] + near[1][3]


# weights, dataset of each position of one period, number of the sample in its dataset
PERIODS = [
    ([1], [0], [0]),
    ([3, 1], [0, 0, 1, 0], [0, 1, 0, 2]),
    ([2, 2, 2], [0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1]),
    ([7, 2, 1], [0, 0, 1, 0, 0, 2, 0, 0, 1, 0], [0, 1, 0, 2, 3, 0, 4, 5, 1, 6]),
    ([1, 2, 3, 4], [3, 2, 1, 3, 2, 3, 0, 1, 2, 3], [0, 0, 0, 1, 1, 2, 0, 1, 2, 3]),
]


@pytest.mark.parametrize(("weights", "datasets", "numbers"), PERIODS)
def test_order_of_a_period_stays_the_same(weights: list[int], datasets: list[int], numbers: list[int]):
    """Another order would change the results of resumed runs."""
    found = MixtureOrder(weights)(np.arange(len(datasets), 2 * len(datasets)))
    assert found[0].tolist() == datasets and found[0].dtype == np.int64
    second_period = [weights[dataset] + number for dataset, number in zip(datasets, numbers, strict=True)]
    assert found[1].tolist() == second_period and found[1].dtype == np.int64


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 100))
@settings(max_examples=80, deadline=None)
def test_drawn_counts_the_positions_of_each_dataset(weights: list[int], count: int):
    order = MixtureOrder(weights)
    datasets, _ = order(np.arange(count))
    assert order.drawn(count) == [int((datasets == number).sum()) for number in range(len(weights))]


def test_weights_become_the_smallest_whole_numbers():
    assert whole_weights({"a": 0.7, "b": 0.2, "c": 0.1}) == {"a": 7, "b": 2, "c": 1}
    assert whole_weights({"a": 3, "b": 1.5}) == {"a": 2, "b": 1}
    with pytest.raises(ValueError, match="repeat only after 1,000,001 samples"):
        whole_weights({"a": 1, "b": 1e-6})


@pytest.fixture(scope="module")
def mixed(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DataManifest:
    """Return a mixture of a large and a small dataset with weights 3 to 1."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, count in (("large", 300), ("small", 30)):
        (folder / name).mkdir()
        corpus = write_jsonl(folder / f"{name}.jsonl", "text", (f"{name} {text(i)}" for i in range(count)))
        part = tokenize_job(folder / name, tokenizer_folder, [corpus], dataset(validation_fraction=0.1))
        tokenize_dataset.run(part.model_copy(update={"name": name}))
    parts = {name: str(folder / name / "data.json") for name in ("large", "small")}
    job = tokenize_job(folder, tokenizer_folder, [], dataset(files=(), mixture={"large": 0.75, "small": 0.25}))
    tokenize_dataset.run(job.model_copy(update={"parts": parts}))
    return DataManifest.read(Path(job.out))


def test_samples_keep_the_proportions_and_small_datasets_are_repeated(mixed: DataManifest, tmp_path: Path):
    samples = Samples.open(mixed, "train", "pretrain", 64, 1, tmp_path)
    parts = [Samples.open(DataManifest(**p["manifest"]), "train", "pretrain", 64, 1, tmp_path) for p in mixed.mixture]
    rounds = 3 * len(parts[1])
    ids = np.concatenate([samples.ids(batch, 4) for batch in range(rounds)])
    assert Counter((ids % 2).tolist()) == {0: 3 * rounds, 1: rounds}
    assert Counter((ids[ids % 2 == 1] // 2).tolist()) == dict.fromkeys(range(len(parts[1])), 3)
    assert ids.tolist() == np.concatenate([samples.ids(batch, 12) for batch in range(rounds // 3)]).tolist()
    for index in ids[:8].tolist():
        assert samples[index].input_ids.tolist() == parts[index % 2][index // 2].input_ids.tolist()


def test_epochs_are_counted_for_each_dataset(mixed: DataManifest, tmp_path: Path):
    """The weights are 3 to 1, so the datasets have 9 and 3 of 12 samples."""
    samples = Samples.open(mixed, "train", "pretrain", 64, 1, tmp_path)
    parts = [Samples.open(DataManifest(**p["manifest"]), "train", "pretrain", 64, 1, tmp_path) for p in mixed.mixture]
    assert samples.epochs(12) == {"large": 9 / len(parts[0]), "small": 3 / len(parts[1])}
    assert parts[0].epochs(len(parts[0])) == {"large": 1.0}


def test_validation_samples_come_from_all_datasets(mixed: DataManifest, tmp_path: Path):
    validation = Samples.open(mixed, "validation", "pretrain", 64, 1, tmp_path)
    assert len(validation) >= 2 and validation[0].input_ids.tolist() != validation[1].input_ids.tolist()
    assert mixed.splits["validation"]["documents"] == sum(
        part["manifest"]["splits"]["validation"]["documents"] for part in mixed.mixture
    )
