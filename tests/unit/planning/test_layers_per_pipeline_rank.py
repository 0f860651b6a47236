"""Layers are spread evenly over pipeline ranks, and none is left out."""

from __future__ import annotations

import pytest

from longhaul.planning.layers_per_pipeline_rank import layers_per_pipeline_rank


@pytest.mark.parametrize(
    ("layers", "ranks", "expected"), [(4, 1, [4]), (4, 2, [2, 2]), (5, 2, [3, 2]), (7, 3, [3, 2, 2]), (3, 3, [1, 1, 1])]
)
def test_layers_are_spread_evenly_over_pipeline_ranks(layers: int, ranks: int, expected: list[int]):
    ranges = layers_per_pipeline_rank(layers, ranks)
    assert [len(own) for own in ranges] == expected
    assert [layer for own in ranges for layer in own] == list(range(layers))
