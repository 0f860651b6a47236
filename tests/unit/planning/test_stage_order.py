"""Stages are planned in an order in which each follows the one that it starts from."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.support.small_configs import STAGE, plan_of

CHAIN = [{**STAGE, "name": "a"}, *({**STAGE, "name": b, "from": {"stage": a}} for a, b in ("ab", "bc", "cd"))]


@given(st.permutations(CHAIN))
def test_a_stage_follows_the_stage_it_starts_from(stages: list[dict[str, object]]):
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_of(Path(folder), {"stages": stages})
    assert [stage.name for stage in plan.stages] == ["a", "b", "c", "d"]


def test_independent_stages_keep_the_order_of_the_file(tmp_path: Path):
    plan = plan_of(tmp_path, {"stages": [{**STAGE, "name": name} for name in "bca"]})
    assert [stage.name for stage in plan.stages] == ["b", "c", "a"]
