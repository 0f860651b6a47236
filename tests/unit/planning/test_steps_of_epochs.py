"""The number of steps of a length in epochs, and its estimate from the manifest of an earlier run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import ConversationCounts, DataManifest
from longhaul.planning import Plan
from longhaul.planning.steps_of_epochs import estimate_steps, steps_of_epochs, window_count
from longhaul.report.plan_json import plan_json
from longhaul.report.plan_table import stage_table
from tests.support.small_configs import plan_of

SHA = "0" * 64


@pytest.mark.parametrize(
    ("epochs", "samples", "global_batch", "steps"),
    [
        (1, 80, 8, 10),
        (1, 81, 8, 11),
        (3, 10, 8, 4),  # 30 samples: the fourth batch takes two of the fourth epoch
        (0.5, 30, 8, 2),
        (0.07, 100, 1, 7),  # 0.07 * 100 is more than 7 in binary numbers
        (1e-9, 100, 8, 1),
        (2, 0, 8, 0),
    ],
)
def test_steps_are_rounded_up(epochs: float, samples: int, global_batch: int, steps: int):
    assert steps_of_epochs(epochs, samples, global_batch) == steps


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (2, 1), (65, 1), (66, 2), (129, 2)])
def test_a_window_of_64_tokens_predicts_64_tokens(tokens: int, windows: int):
    assert window_count(tokens, 64) == windows


def manifest(tokens: int, name: str = "prose", **fields: Any) -> DataManifest:
    split: Any = {"shards": [], "tokens": tokens, "documents": 9, "loss_tokens": tokens}
    return DataManifest(name, "text", "x", SHA, SHA, "uint16", {"train": split}, [], {}, 1.0, **fields)


def written_plan(folder: Path, found: DataManifest, stage: int = 0) -> Plan:
    """Return a plan of two epochs; its dataset has a manifest. Global batch 8, sequence length 64."""
    plan = plan_of(folder, {f"stages.{stage}.steps": ..., f"stages.{stage}.epochs": 2})
    found.write(plan.paths.manifest(plan.stages[stage].stage.dataset))
    return plan


def test_windows_of_a_manifest_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """6,401 tokens are 100 windows of 64; two epochs of them are 25 batches of 8."""
    monkeypatch.chdir(tmp_path)
    plan = written_plan(tmp_path, manifest(6401))
    row = plan_json(plan)["stages"][0]
    assert (row["steps"], row["estimated_steps"], row["tokens"]) == (None, 25, 25 * 8 * 64)
    titles, values = ([str(cell) for cell in column.cells] for column in stage_table([row]).columns)
    assert values[titles.index("steps")] == "2 epochs of prose: about 25"


def counted_plan(folder: Path, kept: dict[str, int], data_hash: str = SHA) -> Plan:
    """Return a plan of two epochs of 9 conversations with 6,401 tokens. kept: what sequences of 64 keep of them."""
    plan = written_plan(folder, manifest(6401, "chats"), stage=1)
    counts: Any = {"sequence_length": 64, "truncate": "right", "cut_documents": 0, **kept}
    ConversationCounts(data_hash, {"train": [counts]}).write(plan.paths.conversation_counts("chats"))
    return plan


def test_packs_are_estimated_from_what_the_stage_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """3,201 of the tokens are kept. They fill 51 packs of 64; two epochs of them are 13 batches of 8."""
    monkeypatch.chdir(tmp_path)
    kept = {"documents": 4, "dropped_documents": 5, "tokens": 3201, "loss_tokens": 100, "cut_loss_tokens": 60}
    plan = counted_plan(tmp_path, kept)
    row = plan_json(plan)["stages"][1]
    assert (row["estimated_steps"], row["cut_loss_share"], row["left_out_share"]) == (13, 0.6, 5 / 9)
    assert titles(plan, 1)["conversations left out"] == "55.6%"
    assert {name: round(epochs, 2) for name, epochs in row["estimated_epochs"].items()} == {"chats": 2.04}


def test_there_is_no_estimate_of_packs_without_the_counts_of_these_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The counts are of another sequence length, of other data, damaged, or missing, as in runs of earlier releases."""
    monkeypatch.chdir(tmp_path)
    kept = {"documents": 9, "tokens": 6401}

    def estimates(plan: Plan) -> list[Any]:
        row = plan_json(plan)["stages"][1]
        return [row[key] for key in ("estimated_steps", "estimated_epochs", "left_out_share")]

    assert estimates(counted_plan(tmp_path, {**kept, "sequence_length": 128})) == [None, {}, None]
    assert estimates(counted_plan(tmp_path, kept, data_hash="1" * 64)) == [None, {}, None]
    plan = counted_plan(tmp_path, kept)
    assert estimates(plan)[0] == 26
    path = plan.paths.conversation_counts("chats")
    path.write_text("{}")
    assert estimates(plan) == [None, {}, None]
    path.unlink()
    assert estimates(plan) == [None, {}, None]


def test_an_epoch_of_a_mixture_is_one_of_every_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """100 and 300 windows: two epochs are 800 samples, for any weights."""
    monkeypatch.chdir(tmp_path)
    parts = [dataclasses.asdict(manifest(tokens, name)) for name, tokens in (("a", 6401), ("b", 19_201))]
    mixture: Any = [{"weight": weight, "manifest": part} for weight, part in zip((3, 1), parts, strict=True)]
    plan = written_plan(tmp_path, manifest(25_602, mixture=mixture))
    assert estimate_steps(plan, plan.stages[0].stage) == 100


@pytest.mark.parametrize(
    ("weights", "expected"), [((3, 1), {"a": 0.6, "b": 0.0667}), ((1, 3), {"a": 0.2, "b": 0.2})], ids=str
)
def test_epochs_of_a_mixture_follow_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: tuple[int, int], expected: dict[str, float]
):
    """10 steps of 8 samples are 80: of weights 3 and 1, 60 of the 100 windows and 20 of the 300."""
    monkeypatch.chdir(tmp_path)
    parts = [dataclasses.asdict(manifest(tokens, name)) for name, tokens in (("a", 6401), ("b", 19_201))]
    mixture: Any = [{"weight": weight, "manifest": part} for weight, part in zip(weights, parts, strict=True)]
    plan = plan_of(tmp_path)
    manifest(25_602, mixture=mixture).write(plan.paths.manifest("prose"))
    row = plan_json(plan)["stages"][0]
    assert {name: round(epochs, 4) for name, epochs in row["estimated_epochs"].items()} == expected


def test_the_plan_says_how_many_epochs_the_steps_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """10 steps of 8 samples are 0.8 epochs of 100 windows. Before the data are tokenized, nobody knows."""
    monkeypatch.chdir(tmp_path)
    plan = plan_of(tmp_path)
    assert "epochs of each dataset, estimated" not in titles(plan)
    manifest(6401).write(plan.paths.manifest("prose"))
    assert titles(plan)["epochs of each dataset, estimated"] == "prose 0.80"


def titles(plan: Plan, stage: int = 0) -> dict[str, str]:
    """Return the lines of the plan's table: title -> value of a stage."""
    names, *values = ([str(cell) for cell in column.cells] for column in stage_table(plan_json(plan)["stages"]).columns)
    return dict(zip(names, values[stage], strict=True))


def test_there_is_no_estimate_without_a_readable_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    plan = written_plan(tmp_path, manifest(6401))
    path = plan.paths.manifest("prose")
    path.write_text("{}")
    assert estimate_steps(plan, plan.stages[0].stage) is None
    path.unlink()
    assert estimate_steps(plan, plan.stages[0].stage) is None
