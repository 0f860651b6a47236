"""The plan says which trained stages a config keeps, continues or trains again, and refuses what the trainer would refuse."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.artifacts.paths import JobId, WeightsFolder
from longhaul.cli import main
from longhaul.errors import InputError, UserError
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.report.planned_changes import (
    AGAIN,
    CONTINUES,
    KEPT,
    TRAINS,
    UNREADABLE,
    StageChange,
    change_lines,
    removed_stages,
    stage_changes,
)
from longhaul.train.checkpoint.weights_identity import find_starting_checkpoint
from tests.support.finished_training_files import SPLIT, train, write_trained_results
from tests.support.small_configs import plan_of
from tests.support.tampered_files import tampered_texts

SITE = {"partitions.0.node.gpu_peak_tflops": 1e-9}
EXPORTED = {"stages.0.export": "last"}
CONSTANT = {"stages.0.steps": 40, "stages.0.schedule": {"kind": "constant"}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which both stages of the small config have trained all of their 10 steps."""
    monkeypatch.chdir(tmp_path)
    write_trained_results(plan_of(tmp_path, EXPORTED, SITE))
    return tmp_path


def changes_of(folder: Path, config: dict[str, Any] | None = None) -> list[StageChange]:
    return stage_changes(plan_of(folder, {**EXPORTED, **(config or {})}, SITE))


def actions(changes: list[StageChange]) -> list[str]:
    return [change.action for change in changes]


def test_unchanged_config_keeps_every_stage(folder: Path) -> None:
    changes = changes_of(folder)
    assert actions(changes) == [KEPT, KEPT] and changes[0].present == changes[0].planned
    assert change_lines(changes)[1] == "  stage base is kept: 10 steps are trained"


def test_renamed_stage_is_named_with_the_weights_that_stay(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else a rename looks like a run that has trained nothing yet."""
    renamed = {**EXPORTED, "stages.0.name": "first", "stages.1.from.stage": "first", "stages.1.name": "second"}
    plan = plan_of(folder, renamed, SITE)
    removed = removed_stages(plan)
    assert list(removed) == ["base", "chat"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(folder / "run.yaml")])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "Compared with the results of this run:\n  stage first trains for the first time" in printed
    assert f"  stage base is not in the config. Its weights {removed['base'].name} stay\n" in printed
    assert removed_stages(plan_of(folder, EXPORTED, SITE)) == {}


def test_without_results_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = changes_of(tmp_path)
    assert actions(changes) == [TRAINS, TRAINS] and change_lines(changes) == []


def test_changed_learning_rate_is_named_with_cost_and_followers(folder: Path) -> None:
    changes = changes_of(folder, {"stages.0.optimizer.lr": 5e-4})
    base, chat = changes
    assert actions(changes) == [AGAIN, AGAIN]
    assert base.reasons == ("optimizer.lr 0.0003 → 0.0005",) and base.planned != base.present
    assert chat.reasons == ("it starts from base, which trains again",)
    assert base.gpu_hours is not None and base.gpu_hours[0] > 0
    line = change_lines(changes)[1]
    assert line.startswith("  stage base trains again, about ") and f"Its weights {base.present.name} stay" in line  # type: ignore[union-attr]
    assert line.endswith("Its export is made again; results/small/export/base/old stays")


def test_change_of_the_last_stage_keeps_the_first(folder: Path) -> None:
    assert actions(changes_of(folder, {"stages.1.global_batch_size": 16})) == [KEPT, AGAIN]


def test_settings_that_do_not_change_results_keep_the_weights(folder: Path) -> None:
    assert actions(changes_of(folder, {"stages.0.minutes": 7, "stages.0.zero": {"stage": 2}})) == [KEPT, KEPT]


def test_return_to_an_earlier_config_finds_its_weights(folder: Path) -> None:
    changed = {"stages.0.optimizer.lr": 5e-4}
    first = changes_of(folder)[0].present
    train(plan_of(folder, changed, SITE), "base", steps=10)
    assert changes_of(folder, changed)[0].action == KEPT
    back = changes_of(folder)[0]
    assert (back.action, back.planned, back.done) == (CONTINUES, first, 10)


def test_unfinished_stage_continues_with_the_steps_that_are_left(folder: Path) -> None:
    whole = changes_of(folder, CONSTANT)[0].gpu_hours
    plan = plan_of(folder, CONSTANT, SITE)
    train(plan, "base", steps=30)
    plan.paths.stage("base").checkpoint.unlink()
    base = stage_changes(plan)[0]
    assert (base.action, base.done, base.steps) == (CONTINUES, 30, 40)
    assert whole is not None and base.gpu_hours == pytest.approx((whole[0] / 4, whole[1] / 4))
    assert change_lines([base])[1].startswith("  stage base continues at step 30 of 40")


def test_more_steps_under_a_decaying_schedule_are_refused_until_the_remedy_is_followed(folder: Path) -> None:
    """With `restart: true` the stage trains again in a new folder."""
    assert plan_of(folder).stages[0].stage.schedule.kind == "cosine"
    with pytest.raises(UserError, match="steps changed from 10 to 20") as caught:
        changes_of(folder, {"stages.0.steps": 20})
    assert "set the length back to 10 steps, or set restart: true" in str(caught.value)
    assert changes_of(folder, {"stages.0.steps": 10})[0].action == KEPT
    again = changes_of(folder, {"stages.0.steps": 20, "stages.0.restart": True})[0]
    assert again.action == AGAIN and set(again.reasons) == {"restart False → True", "steps 10 → 20"}


def test_checkpoint_of_another_release_is_refused_until_the_run_has_another_name(folder: Path) -> None:
    """It is not taken for a damaged one: then days of training would start again."""
    weights = changes_of(folder)[0].present
    assert weights
    (manifest,) = WeightsFolder(weights).checkpoints.glob("*/manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 3}))
    refusal = f"{manifest} has schema version 3, this release of longhaul reads version 2"
    with pytest.raises(InputError, match=re.escape(refusal)) as caught:
        changes_of(folder)
    assert caught.value.exit_code == 2 and caught.value.failure_class == "environment"
    assert "finish the run with the release that saved it, or change `run` in the config" in caught.value.hint
    assert actions(changes_of(folder, {"run": "again"})) == [TRAINS, TRAINS] and manifest.exists()


def test_start_from_a_missing_best_checkpoint_is_refused_until_it_is_the_last_one(folder: Path) -> None:
    job = job_spec(plan_of(folder), JobId("train", ("chat",)))
    assert isinstance(job, TrainSpec) and job.stage.start_from
    for which in ("best", "last"):
        start = job.stage.start_from.model_copy(update={"checkpoint": which})
        asked = job.model_copy(update={"stage": job.stage.model_copy(update={"start_from": start})})
        if which == "last":
            assert find_starting_checkpoint(asked)
        else:
            with pytest.raises(
                UserError, match=r"has no `best` checkpoint\s+remedy: set stages.chat.from.checkpoint to last"
            ):
                find_starting_checkpoint(asked)


def test_data_that_are_made_again_are_the_reason(folder: Path) -> None:
    changes = changes_of(folder, {"datasets.prose.max_document_mb": 5})
    assert changes[0].reasons == ("the tokenizer is made again",)  # it is trained on the dataset
    manifest = plan_of(folder).paths.manifest("chats")
    DataManifest("chats", "chat", "d", "other", "t0", "uint16", {"train": SPLIT}, [], {}, 1.0).write(manifest)
    assert changes_of(folder)[1].reasons == ("its data changed",)
    manifest.unlink()
    assert changes_of(folder)[1].reasons == ("dataset chats is made again",)


def test_input_file_newer_than_its_manifest_counts_as_changed(folder: Path) -> None:
    (folder / "chats.jsonl").write_text("{}\n")
    own = {"datasets.chats": {"kind": "chat", "files": ["chats.jsonl"]}}
    plan = plan_of(folder, own, SITE)
    job_spec(plan, JobId("tokenize", ("chats",))).write(plan.paths.job(JobId("tokenize", ("chats",))).job_spec)
    os.utime(folder / "chats.jsonl", (1e9, 1e9))
    assert actions(changes_of(folder, own)) == [KEPT, KEPT]
    os.utime(folder / "chats.jsonl", (4e9, 4e9))
    assert changes_of(folder, own)[1].reasons == ("dataset chats is made again",)


def test_export_with_other_settings_is_made_again(folder: Path) -> None:
    base = changes_of(folder, {"stages.0.export_dtype": "fp32"})[0]
    assert base.action == KEPT and base.export == "Its export is made again; results/small/export/base/old stays"


@pytest.mark.parametrize("record", ["base checkpoint", "chat checkpoint", "identity", "data", "tokenizer", "export"])
def test_no_tampered_record_ends_in_a_traceback(folder: Path, record: str) -> None:
    plan = plan_of(folder, EXPORTED, SITE)
    weights = WeightsFolder(cast(Path, changes_of(folder)[0].present))
    path = {
        "base checkpoint": plan.paths.stage("base").checkpoint,
        "chat checkpoint": plan.paths.stage("chat").checkpoint,
        "identity": weights.identity,
        "data": plan.paths.manifest("prose"),
        "tokenizer": plan.paths.tokenizer,
        "export": plan.paths.export_manifest("base"),
    }[record]
    plans = [plan_of(folder, {**EXPORTED, **changes}, SITE) for changes in ({}, {"stages.0.optimizer.lr": 5e-4})]
    for _, tampered in tampered_texts(path.read_bytes()):
        path.write_bytes(tampered)
        for plan in plans:
            with suppress(InputError):
                change_lines(stage_changes(plan))


def test_damaged_identity_is_named_and_stops_no_run(folder: Path) -> None:
    changes = changes_of(folder)
    WeightsFolder(cast(Path, changes[0].present)).identity.write_text('{"spec": {')
    changed = changes_of(folder, {"stages.0.optimizer.lr": 5e-4})
    assert actions(changed) == [UNREADABLE, AGAIN]
    assert "stage base cannot be compared: " in change_lines(changed)[1] and "identity.json" in change_lines(changed)[1]
