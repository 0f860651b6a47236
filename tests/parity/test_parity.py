"""A part of the parity table, and what else must hold of a layout's checkpoints. `make parity` prints the whole table."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.artifacts.schemas import Checkpoint
from longhaul.checkpoint_io import open_master_weights
from longhaul.checkpoint_io.torch_archive import StoredTensor, read_archive
from longhaul.config.load import load_config
from longhaul.config.model_size import ARCHITECTURES
from longhaul.errors import UserError
from longhaul.planning import make_plan
from tests.parity import parity_table as parity
from tests.parity.parity_cases import FP32, LAYOUTS, MODELS, SUBSET, cells

FOLDER_CELL, OTHER_CELL = ("deepseek_v3", "expert 2, tensor 2"), ("deepseek_v3", "expert 2, pipeline 2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def results(folder: Path, offload_ops: None) -> dict[tuple[str, str], parity.Result]:
    return {(result.twin, result.layout): result for result in parity.run(list(SUBSET), folder)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cell", SUBSET, ids="/".join)
def test_a_layout_trains_resumes_and_exports_as_plain_pytorch_does(
    results: dict[tuple[str, str], parity.Result], cell: tuple[str, str]
):
    assert not results[cell].problem, results[cell].line()


def test_a_wrong_gradient_would_be_noticed(results: dict[tuple[str, str], parity.Result], folder: Path):
    """The table compares with what the reference found, not with itself."""
    cell = SUBSET[0]
    trace = parity._reference(cell[0], folder / "shared", folder)
    trace.norms[4] *= 1 + 2 * FP32.norm
    assert parity._judge(cell, trace, folder / "shared", folder, "").problem == "differs in grad norm"


def test_the_tokens_of_each_expert_of_every_layer_are_in_the_metrics(
    results: dict[tuple[str, str], parity.Result], folder: Path
):
    """Those of both pipeline stages; validations follow the last step of each of the two legs."""
    rows = parity.steps(folder / OTHER_CELL[0] / OTHER_CELL[1])
    assert [row["step"] for row in rows if "expert_load" in row] == [5, 10]
    loads = rows[-1]["expert_load"]
    assert sorted(loads) == ["1", "2", "3"]
    assert all(len(load) == 8 and sum(load) == 2 * 8 * 64 for load in loads.values())
    busiest = max(max(load) for load in loads.values()) / (2 * 64)
    assert rows[-1]["expert_load_max"] == pytest.approx(busiest, abs=1e-4)


def test_every_twin_and_kind_of_layout_is_in_the_table():
    assert len(cells()) >= 40 and set(SUBSET) <= set(cells())
    assert {twin for twin, _ in cells()} == set(MODELS) == set(ARCHITECTURES)
    assert max(layout.ranks for layout in LAYOUTS.values()) == 8


def checkpoint(folder: Path, cell: tuple[str, str]) -> Path:
    finished = Checkpoint.read(folder / cell[0] / cell[1] / "stages/main/checkpoint.json")
    return Path(finished.weights) / finished.checkpoints["last"]["path"]


def fp32_bytes(value: Any) -> int:
    """Of all tensors in what an archive holds, the step counts of Adam aside."""
    if isinstance(value, StoredTensor):
        size = 4 * math.prod(value.shape)
        return size if value.dtype == torch.float32 and size > 4 else 0
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(fp32_bytes, parts))


@pytest.mark.parametrize("cell", SUBSET, ids="/".join)
def test_each_rank_holds_the_share_of_the_optimizer_that_was_planned(
    results: dict[tuple[str, str], parity.Result], folder: Path, cell: tuple[str, str]
):
    """By the tensors of its file: masters and moments, with DeepSpeed's padding; gradients lie on the disk beside them."""
    planned = make_plan(load_config(folder / cell[0] / cell[1] / "run.yaml")).stages[0].memory
    assert planned
    files = sorted(checkpoint(folder, cell).glob("*zero_pp_rank_*_optim_states.pt"))
    held = [fp32_bytes(read_archive(path)) for path in files]
    assert len(held) == LAYOUTS[cell[1]].ranks
    assert max(held) == pytest.approx(planned.optimizer or planned.disk * 12 / 16, rel=0.005)


def test_an_exported_folder_begins_any_layout(results: dict[tuple[str, str], parity.Result], folder: Path):
    """The first losses of three layouts that begin with one Hugging Face folder, and with one checkpoint of another layout."""
    source = folder / FOLDER_CELL[0] / FOLDER_CELL[1]
    begins = {"pretrained": source / "export", "start": source / "stages/main/checkpoint.json"}
    layouts = ("data 2, ZeRO 3", "expert 2", "pipeline 2")
    chosen = [(FOLDER_CELL[0], layout, f"{kind}={path}") for kind, path in begins.items() for layout in layouts]
    assert parity.train(2, list(chosen), folder / "shared", folder) == {}
    losses = {
        (kind, layout): [row["loss"] for row in parity.steps(folder / FOLDER_CELL[0] / f"{layout}, {kind}")]
        for _, layout, begin in chosen
        for kind in [begin.partition("=")[0]]
    }
    before = parity.steps(source)[0]["loss"]
    for name, found in losses.items():
        assert found[0] < 0.9 * before, f"{name} began from other weights than the trained ones"
        assert found == pytest.approx(losses["pretrained", layouts[0]], rel=FP32.loss), name


def break_layout(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    layout = json.loads((folder / "layout.json").read_text())
    change(layout["entries"])
    (folder / "layout.json").write_text(json.dumps(layout))


def drop_a_part(entries: list[dict[str, Any]]) -> None:
    entries.remove(next(entry for entry in entries if entry["name"].endswith("gate_up_proj")))


def double_a_part(entries: list[dict[str, Any]]) -> None:
    first, second = [entry for entry in entries if entry["name"].endswith("layers.1.mlp.experts.down_proj")][:2]
    axes = dict(first["parts"])
    width = axes[2][0][1] - axes[2][0][0]
    second["parts"] = [[0, axes[0]], [2, [[width // 2, width // 2 + width]]]]


def replicate_in_silence(entries: list[dict[str, Any]]) -> None:
    """As if every tensor rank held all of a tensor that the file has a part of."""
    entry = next(entry for entry in entries if entry["name"].endswith("o_proj.weight"))
    entry["parts"] = []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop_a_part, "hold|number of ranks|no entry"),
        (double_a_part, "overlap"),
        (replicate_in_silence, "has shape"),
    ],
)
def test_a_missing_doubled_or_replicated_part_is_refused(
    results: dict[tuple[str, str], parity.Result],
    folder: Path,
    tmp_path: Path,
    change: Callable[[list[dict[str, Any]]], None],
    says: str,
):
    copy = shutil.copytree(checkpoint(folder, FOLDER_CELL), tmp_path / "step-00000010")
    break_layout(copy, change)
    with pytest.raises(UserError, match=says):
        open_master_weights(copy)


def test_a_missing_rank_is_named(results: dict[tuple[str, str], parity.Result], folder: Path, tmp_path: Path):
    copy = shutil.copytree(checkpoint(folder, OTHER_CELL), tmp_path / "step-00000010")
    (copy / "zero_pp_rank_1_mp_rank_01_optim_states.pt").unlink()
    with pytest.raises(UserError, match="model rank 1, data rank 1 is missing"):
        open_master_weights(copy)
