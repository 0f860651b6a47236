"""Trains a subset of the parity table and checks the checkpoints of its layouts. `make parity` prints the whole table."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.artifacts.artifact_schemas import Checkpoint
from longhaul.checkpoint_io import open_master_weights
from longhaul.checkpoint_io.torch_archive import StoredTensor, read_archive
from longhaul.config.architectures import ARCHITECTURES
from longhaul.config.load_config import load_config
from longhaul.errors import UserError
from longhaul.planning import build_plan
from tests.parity import parity_table
from tests.parity.parity_cases import FP32, LAYOUTS, MODELS, TEST_SUBSET, Case, all_cases
from tests.parity.parity_table import CaseResult

TENSOR_CASE, PIPELINE_CASE = ("deepseek_v3", "expert 2, tensor 2"), ("deepseek_v3", "expert 2, pipeline 2")
QUICK_CASES = (TEST_SUBSET[0], ("deepseek_v3", "sequence 2, data 2, ZeRO 3"), TENSOR_CASE, PIPELINE_CASE)
"""`make test` trains these, `make test-all` all of TEST_SUBSET."""
CASES = [case if case in QUICK_CASES else pytest.param(case, marks=pytest.mark.slow) for case in TEST_SUBSET]
Results = dict[Case, CaseResult]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def results(folder: Path, offload_ops: None, pytestconfig: pytest.Config) -> Results:
    cases = TEST_SUBSET if pytestconfig.getoption("all") else QUICK_CASES
    return {(result.model, result.layout): result for result in parity_table.run_cases(list(cases), folder)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_a_layout_trains_resumes_and_exports_like_plain_pytorch(results: Results, case: Case):
    assert not results[case].problem, results[case].line()


def test_a_wrong_gradient_norm_is_noticed(results: Results, folder: Path):
    """The table compares with the reference loop, not with itself."""
    case = TEST_SUBSET[0]
    trace = parity_table.train_reference(parity_table.reference_of(case), folder / "shared", folder)
    trace.norms[4] *= 1 + 2 * FP32.norm
    result = parity_table.compare_case(case, trace, folder / "shared", folder, "")
    assert result.problem == "differs in grad norm"


def test_metrics_contain_the_expert_load_of_every_layer(results: Results, folder: Path):
    """Layers of both pipeline ranks are there. Both attempts validate after their last step, which records the load."""
    rows = parity_table.step_metrics(folder / PIPELINE_CASE[0] / PIPELINE_CASE[1])
    assert [row["step"] for row in rows if "expert_load" in row] == [5, 10]
    loads = rows[-1]["expert_load"]
    assert sorted(loads) == ["1", "2", "3"]
    choices = 2 * rows[-1]["tokens"]  # of two experts for each token that is no padding
    assert all(len(load) == 8 and sum(load) == choices for load in loads.values())
    busiest = max(max(load) for load in loads.values()) / (choices / 8)
    assert rows[-1]["expert_load_max"] == pytest.approx(busiest, abs=1e-4)


def test_the_table_has_every_model_and_kind_of_layout():
    assert len(all_cases()) >= 40 and set(TEST_SUBSET) <= set(all_cases())
    assert {model for model, _ in all_cases()} == set(MODELS)
    assert {family for model in MODELS.values() for family in model} == set(ARCHITECTURES)
    assert max(layout.ranks for layout in LAYOUTS.values()) == 8


def last_checkpoint(folder: Path, case: Case) -> Path:
    finished = Checkpoint.read(folder / case[0] / case[1] / "stages/main/checkpoint.json")
    return Path(finished.weights) / finished.checkpoints["last"]["path"]


def fp32_bytes(value: Any) -> int:
    """Return the bytes of all fp32 tensors in the content of an archive, without Adam's scalar step counts."""
    if isinstance(value, StoredTensor):
        size = 4 * math.prod(value.shape)
        return size if value.dtype == torch.float32 and size > 4 else 0
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(fp32_bytes, children))


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_each_rank_holds_the_planned_bytes_of_the_optimizer(results: Results, folder: Path, case: Case):
    """A rank's optimizer file has master weights and moments with DeepSpeed's padding; swapped gradients are not in it."""
    planned = build_plan(load_config(folder / case[0] / case[1] / "run.yaml")).stages[0].memory
    assert planned
    files = sorted(last_checkpoint(folder, case).glob("*zero_pp_rank_*_optim_states.pt"))
    held = [fp32_bytes(read_archive(path)) for path in files]
    assert len(held) == LAYOUTS[case[1]].ranks
    assert max(held) == pytest.approx(planned.optimizer or planned.disk * 12 / 16, rel=0.005)


def test_an_export_or_checkpoint_can_start_a_stage_in_any_layout(results: Results, folder: Path):
    """Three layouts start from one Hugging Face folder, and from one checkpoint of another layout; first losses agree."""
    source = folder / TENSOR_CASE[0] / TENSOR_CASE[1]
    starts = {"pretrained": source / "export/latest", "checkpoint": source / "stages/main/checkpoint.json"}
    layouts = ("data 2, ZeRO 3", "expert 2", "pipeline 2")
    cases = [(TENSOR_CASE[0], layout, f"{kind}={path}") for kind, path in starts.items() for layout in layouts]
    for case in cases:
        assert not parity_table.train_case(case, folder / "shared", folder), case
    losses = {
        (kind, layout): [
            row["loss"] for row in parity_table.step_metrics(folder / TENSOR_CASE[0] / f"{layout}, {kind}")
        ]
        for kind in starts
        for layout in layouts
    }
    seeded_loss = parity_table.step_metrics(source)[0]["loss"]
    for name, own in losses.items():
        assert own[0] < 0.9 * seeded_loss, f"{name} did not start from the trained weights"
        assert own == pytest.approx(losses["pretrained", layouts[0]], rel=FP32.loss), name


Slices = list[dict[str, Any]]


def change_slice_index(folder: Path, change: Callable[[Slices], None]) -> None:
    index = json.loads((folder / "slice_index.json").read_text())
    change(index["slices"])
    (folder / "slice_index.json").write_text(json.dumps(index))


def drop_slice(slices: Slices) -> None:
    slices.remove(next(entry for entry in slices if entry["name"].endswith("gate_up_proj")))


def shift_slice(slices: Slices) -> None:
    first, second = [entry for entry in slices if entry["name"].endswith("layers.1.mlp.experts.down_proj")][:2]
    axis_ranges = dict(first["axis_ranges"])
    width = axis_ranges[2][0][1] - axis_ranges[2][0][0]
    second["axis_ranges"] = [[0, axis_ranges[0]], [2, [[width // 2, width // 2 + width]]]]


def state_whole_tensor(slices: Slices) -> None:
    """State that a rank holds a whole tensor, although its file has a slice."""
    entry = next(entry for entry in slices if entry["name"].endswith("o_proj.weight"))
    entry["axis_ranges"] = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_slice, "hold|ranks|no entry"),
        (shift_slice, "overlap"),
        (state_whole_tensor, "has shape"),
    ],
)
def test_a_missing_overlapping_or_wrong_slice_is_refused(
    results: Results, folder: Path, tmp_path: Path, change: Callable[[Slices], None], message: str
):
    copy = shutil.copytree(last_checkpoint(folder, TENSOR_CASE), tmp_path / "step-00000010")
    change_slice_index(copy, change)
    with pytest.raises(UserError, match=message):
        open_master_weights(copy)


def test_a_missing_rank_is_named(results: Results, folder: Path, tmp_path: Path):
    copy = shutil.copytree(last_checkpoint(folder, PIPELINE_CASE), tmp_path / "step-00000010")
    (copy / "zero_pp_rank_1_mp_rank_01_optim_states.pt").unlink()
    with pytest.raises(UserError, match="model rank 1, data rank 1 is missing"):
        open_master_weights(copy)
