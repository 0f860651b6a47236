"""Stages are planned in an order in which each follows the one that it starts from."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longhaul.config.load_config import load_config
from longhaul.errors import UserError
from longhaul.planning.stage_order import sort_stages
from tests.support.small_configs import CHAT, STAGE, plan_of, write_config

CHAIN = [{**STAGE, "name": "a"}, *({**STAGE, "name": b, "from": {"stage": a}} for a, b in ("ab", "bc", "cd"))]


@given(st.permutations(CHAIN))
def test_a_stage_follows_the_stage_it_starts_from(stages: list[dict[str, object]]):
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_of(Path(folder), {"stages": stages})
    assert [stage.name for stage in plan.stages] == ["a", "b", "c", "d"]


def test_independent_stages_keep_the_order_of_the_file(tmp_path: Path):
    plan = plan_of(tmp_path, {"stages": [{**STAGE, "name": name} for name in "bca"]})
    assert [stage.name for stage in plan.stages] == ["b", "c", "a"]


# stages, expected message, expected remedy
ORDERS: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "one name twice": (
        [STAGE, STAGE],
        "stages: the name base occurs twice",
        "give each stage a different name",
    ),
    "start from an unknown stage": (
        [STAGE, {**CHAT, "from": {"stage": "bse"}}],
        "stages.chat.from.stage: there is no stage 'bse'",
        "use one of base, chat",
    ),
    "a cycle": (
        [{**STAGE, "name": one, "from": {"stage": other}} for one, other in ("ab", "bc", "cb")],
        "stages: a <- b <- c <- b is a cycle",
        "remove `from` in one of these stages",
    ),
}


@pytest.mark.parametrize(("stages", "message", "remedy"), ORDERS.values(), ids=ORDERS)
def test_stages_without_an_order_are_refused(tmp_path: Path, stages: list[dict[str, Any]], message: str, remedy: str):
    config = load_config(write_config(tmp_path, {"stages": stages})).config
    with pytest.raises(UserError) as refused:
        sort_stages(config)
    assert (refused.value.message, refused.value.hint) == (message, remedy)
