"""The groups of ranks along each axis of a parallel layout; no process groups are created."""

from __future__ import annotations

import pytest

from longhaul.config.stage_config import Parallel
from longhaul.train.parallel import parallel_dims
from longhaul.train.parallel.parallel_dims import GROUP_AXES, ParallelDims


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"sequence": 4},
        {"tensor": 2, "sequence": 2},
        {"tensor": 2, "pipeline": 2, "expert": 2},
        {"pipeline": 4, "expert": 4},
    ],
)
@pytest.mark.parametrize("axis", GROUP_AXES)
def test_a_group_has_the_ranks_that_differ_only_along_its_axis(axes: dict[str, int], axis: str):
    parallel, ranks = Parallel(**axes), range(16)
    position = {rank: parallel_dims._position_off_axis(ParallelDims(rank, 16, parallel), axis) for rank in ranks}
    expected = dict.fromkeys(tuple(r for r in ranks if position[r] == position[rank]) for rank in ranks)
    assert [tuple(group) for group in parallel_dims._rank_groups(parallel, 16, axis)] == list(expected)
    for rank in ranks:
        group = ParallelDims(rank, 16, parallel).get_data_parallel_group_ranks()
        assert rank in group and len(group) == ParallelDims(rank, 16, parallel).data


def test_groups_of_two_thousand_ranks_compute_each_position_once(monkeypatch: pytest.MonkeyPatch):
    ranks, position_off_axis = [], parallel_dims._position_off_axis
    monkeypatch.setattr(
        parallel_dims,
        "_position_off_axis",
        lambda dims, axis: ranks.append(dims.rank) or position_off_axis(dims, axis),
    )
    groups = parallel_dims._rank_groups(Parallel(tensor=8, pipeline=8, expert=8), 2048, "expert_data")
    assert sorted(ranks) == list(range(2048)) == sorted(rank for group in groups for rank in group)
