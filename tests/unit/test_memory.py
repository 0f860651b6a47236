"""The plan's memory beside what a GPU measured: `make bench-memory` wrote the peaks to bench/results/gpu_memory.txt."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from chain import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "bench"))
from gpu_memory import MODELS, OPTIONS, plan
from memory_plan import REFERENCE, make_175b_plan

MEASURED = REPOSITORY / "bench/results/gpu_memory.txt"


def measured_gib() -> dict[tuple[str, str], float]:
    """(model, option) -> peak in GiB; a model's table begins with its name, a row's third column is the peak."""
    found, model = {}, ""
    for line in MEASURED.read_text().splitlines():
        first, *rest = line.split() or [""]
        model = first if first in MODELS else model
        if first in OPTIONS and rest[0].replace(".", "").isdigit():
            found[model, first] = float(rest[1])
    return found


@pytest.mark.parametrize(("model", "option"), [(m, o) for m in ("dense", "mixture") for o in OPTIONS])
def test_the_plan_is_within_a_tenth_of_the_measured_peak(model: str, option: str, tmp_path: Path):
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n')
    memory = plan(tmp_path, model).stage(option).memory
    assert memory
    assert memory.total / 2**30 == pytest.approx(measured_gib()[model, option], rel=0.1)


def test_keeping_fewer_activations_saves_a_third_and_more_at_175_billion_parameters():
    totals = {stage.name: stage.memory.total for stage in make_175b_plan().stages if stage.memory}
    assert list(totals) == ["none", "selective", "full", "offload"]
    assert sorted(totals.values(), reverse=True) == list(totals.values())
    assert totals["full"] < REFERENCE * totals["none"]
