"""Normal random numbers that follow from a key and an index."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from longhaul.train import counter_based_normal
from longhaul.train.counter_based_normal import normal

CPU = torch.device("cpu")
MASK = (1 << 64) - 1


def split_mix(state: int) -> int:
    """Return SplitMix64's output for a state, in Python's own integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_bits_are_those_of_split_mix():
    """1234567 is the seed of the generator's published test values."""
    bits = counter_based_normal._random_bits(1234567, 0, 5, CPU)
    assert [int(value) & MASK for value in bits] == [
        split_mix((1234567 + (index + 1) * 0x9E3779B97F4A7C15) & MASK) for index in range(5)
    ]
    assert int(bits[0]) & MASK == 6457827717110365317


def test_values_depend_on_key_and_index_alone(monkeypatch: pytest.MonkeyPatch):
    whole = normal("1/name", torch.Size([40, 50]), 0.02, CPU)
    monkeypatch.setattr(counter_based_normal, "_CHUNK_ELEMENTS", {"cpu": 7})
    assert torch.equal(normal("1/name", torch.Size([2000]), 0.02, CPU), whole.flatten())
    assert torch.equal(normal("1/name", torch.Size([30]), 0.02, CPU), whole.flatten()[:30])
    assert not torch.equal(normal("2/name", torch.Size([40, 50]), 0.02, CPU), whole)


def test_the_number_of_threads_is_restored(monkeypatch: pytest.MonkeyPatch):
    before, used = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "index_select", lambda *_arguments, **_options: used.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        normal("0/x", torch.Size([3]), 1.0, CPU)
        assert used == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_values_are_normal():
    """The largest distance to the distribution function is below the limit of Kolmogorov and Smirnov at 1 %."""
    count, std = 200_000, 0.5
    values = normal("0/x", torch.Size([count]), std, CPU)
    expected = torch.special.ndtr(values.double().sort().values / std)
    steps = torch.arange(1, count + 1) / count
    assert float((expected - steps).abs().max()) < 1.63 / math.sqrt(count)
    assert float(values.double().std()) == pytest.approx(std, rel=0.01)
    assert abs(float(values.double().mean())) < 3 * std / math.sqrt(count)


def test_neighbours_and_other_keys_are_independent():
    one, other = (normal(key, torch.Size([100_000]), 1.0, CPU) for key in ("0/a", "0/b"))
    for x, y in ((one[1:], one[:-1]), (one, other)):
        assert abs(float((x * y).mean())) < 4 / math.sqrt(len(x))


def test_large_values_are_as_frequent_as_they_should_be():
    values = normal("0/tails", torch.Size([1_000_000]), 1.0, CPU)
    for limit in (3.0, 4.0):
        expected = 2 * NormalDist().cdf(-limit) * len(values)
        assert int((values.abs() > limit).sum()) == pytest.approx(expected, abs=4 * math.sqrt(expected))


def test_the_first_values_never_change():
    """A change would give every new stage other initial weights."""
    values = normal("0/model.embed_tokens.weight", torch.Size([4]), 0.02, CPU)
    assert values.tolist() == pytest.approx(GOLDEN, abs=0)


GOLDEN = [0.01103922538459301, -0.02017068862915039, 0.015492487698793411, -0.0460691824555397]
