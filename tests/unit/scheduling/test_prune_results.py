"""`longhaul prune` lists what neither the config nor the finished results refer to, and removes it only on request."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from longhaul.artifacts.atomic_files import replace_link, write_text
from longhaul.artifacts.endpoint import Endpoint
from longhaul.artifacts.job_state import State
from longhaul.artifacts.leases import LeaseOwner
from longhaul.artifacts.paths import JobId, WeightsFolder
from longhaul.errors import UserError
from longhaul.planning import Plan
from longhaul.scheduling import slurm_client
from longhaul.scheduling.prune_results import KEPT_ATTEMPTS, find_old_results, prune
from longhaul.scheduling.slurm_client import QueueEntry, SlurmCommandError
from tests.support.finished_training_files import train, write_trained_results
from tests.support.small_configs import plan_of

EXPORTED = {"stages.0.export": "last"}
LR = {"stages.0.optimizer.lr": 5e-4, **EXPORTED}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of a finished run on a Slurm site whose queue is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_client, "queue_of", lambda *_: [])
    plan = plan_of(tmp_path, EXPORTED)
    write_trained_results(plan)
    write_text(Path("results/small/export/base/old/model.safetensors"), "x" * 2000)
    replace_link(plan.paths.export("base"), "old")
    return plan


def paths_of(plan: Plan) -> list[str]:
    return [str(result.path) for result in find_old_results(plan)]


def test_nothing_of_a_finished_run_is_old(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_old_results(plan) == []
    prune(plan, delete=True)
    assert capsys.readouterr().out.startswith("nothing is old")


def test_results_stay_until_the_changed_config_has_trained(plan: Plan, tmp_path: Path) -> None:
    """Then the first weights are old, but not while the second stage still starts from them."""
    base = WeightsFolder(Path(json.loads(plan.paths.stage("base").checkpoint.read_text())["weights"])).path
    chat = Path(json.loads(plan.paths.stage("chat").checkpoint.read_text())["weights"])
    changed = plan_of(tmp_path, LR)
    assert paths_of(changed) == []
    plan.paths.export_manifest("base").unlink()  # the export of the changed weights has not been written yet
    plan.paths.export("base").unlink()
    train(changed, "base", steps=10)
    assert paths_of(changed) == ["results/small/export/base/old"]
    train(changed, "chat", steps=10)
    assert paths_of(changed) == [str(base), str(chat), "results/small/export/base/old"]


def test_only_delete_removes_and_says_how_much(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = Path("results/small/stages/gone/weights/0123456789abcdef")
    write_text(old / "checkpoints/step-00000010/x.pt", "x" * 5000)
    prune(plan, delete=False)
    printed = capsys.readouterr().out
    assert "gone: the config has no such stage" in printed and "Nothing was removed: add --delete" in printed
    assert old.exists() and "4.88 KiB can be freed" in printed
    prune(plan, delete=True)
    assert not old.exists() and not old.with_name(f"{old.name}.removed").exists()
    assert "4.88 KiB freed" in capsys.readouterr().out and paths_of(plan) == []


def test_leftover_of_an_interrupted_prune_does_not_stop_the_next_one(plan: Plan) -> None:
    old = Path("results/small/stages/gone/weights/0123456789abcdef")
    leftover = old.with_name(f"{old.name}.removed")
    write_text(old / "checkpoints/step-00000010/x.pt", "x")
    write_text(leftover / "checkpoints/step-00000005/x.pt", "x")
    prune(plan, delete=True)
    assert not old.exists() and not leftover.exists() and paths_of(plan) == []


def test_weights_in_a_storage_of_their_own_are_found(plan: Plan, tmp_path: Path) -> None:
    """Those below the run are old then, too, as the config has moved them; but not those of base, of which the export is."""
    stored = plan_of(tmp_path, {**EXPORTED, "storage.weights": str(tmp_path / "scratch")})
    new = train(stored, "base", steps=10)
    train(stored, "chat", steps=10)
    assert new.is_relative_to(tmp_path / "scratch/small/base")
    old = tmp_path / "scratch/small/base/0123456789abcdef"
    old.mkdir()
    found = [result.path.absolute() for result in find_old_results(stored) if result.kind == "weights"]
    assert old in found and new.absolute() not in found
    assert [path.parent.parent.name for path in found if path != old] == ["chat"]


def test_other_folders_and_links_beside_weights_stay(plan: Plan, tmp_path: Path) -> None:
    weights = plan.paths.stage("base").weights
    write_text(weights / "my-notes" / "a.txt", "mine")
    (tmp_path / "elsewhere").mkdir()
    (weights / "0123456789abcdef").symlink_to(tmp_path / "elsewhere")
    assert paths_of(plan) == []


def test_interrupted_export_is_old(plan: Plan) -> None:
    write_text(plan.paths.exports("base") / ".0123-10-bf16.partial" / "model.safetensors", "x")
    (found,) = find_old_results(plan)
    assert (found.kind, found.reason) == ("export", "base: an export that was interrupted")


def test_stage_that_is_no_longer_exported_leaves_no_dangling_link(plan: Plan, tmp_path: Path) -> None:
    changed = plan_of(tmp_path, {"stages.0.export": "none"})
    assert paths_of(changed) == ["results/small/export/base/old"]
    prune(changed, delete=True)
    assert list(plan.paths.exports("base").iterdir()) == [] and not plan.paths.export_manifest("base").exists()


def test_stage_whose_records_cannot_be_read_keeps_all_of_its_weights(plan: Plan, tmp_path: Path) -> None:
    train(plan_of(tmp_path, LR), "base", steps=10)
    plan.paths.stage("base").checkpoint.write_text("{")
    assert paths_of(plan) == []


def test_logs_of_the_last_attempts_stay(plan: Plan) -> None:
    logs = plan.paths.attempt_logs(JobId("train", ("base",)))
    for attempt in range(1, KEPT_ATTEMPTS + 3):
        write_text(logs.log(attempt), "text")
        write_text(Path(f"{logs.collective_record_prefix(logs.log(attempt))}12"), "record")
    kept = ("train/base.log", "controller.log", "mine/x.log", "serve/base.log")
    for name in ("train/gone/attempt-0001.log", "train/gone.log", *kept):
        write_text(plan.paths.logs / name, "text")
    old = [
        "train/base/attempt-0001.log",
        "train/base/attempt-0001-collectives-rank-12",
        "train/base/attempt-0002.log",
        "train/base/attempt-0002-collectives-rank-12",
        "train/gone/attempt-0001.log",
        "train/gone.log",
    ]
    assert paths_of(plan) == [str(plan.paths.logs / name) for name in old]
    prune(plan, delete=True)
    assert paths_of(plan) == [] and len(logs.logs()) == KEPT_ATTEMPTS


def test_active_run_is_refused_until_nothing_works_on_it(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Path("results/small/stages/gone/weights/0123456789abcdef")
    write_text(old / "identity.json", "{}")
    plan.paths.lease.write_text(json.dumps(asdict(LeaseOwner.this_process())))
    with pytest.raises(UserError, match="run small is active: process"):
        prune(plan, delete=True)
    plan.paths.lease.unlink()
    entry = QueueEntry(
        "8",
        "PENDING",
        "Priority",
        "N/A",
        "longhaul-small_0b3aa5a6-6a1c-4d5c-9d3a-1f6f6f0e2b11",
        "rule_train_wildcards_small_base",
    )
    monkeypatch.setattr(slurm_client, "queue_of", lambda *_: [entry])
    with pytest.raises(UserError, match="jobs of run small are in Slurm's queue: 8"):
        prune(plan, delete=True)
    by_hand = QueueEntry("9", "RUNNING", "None", "N/A", "by-hand", "")
    State("running", "9", "n1", ["n1"], 1, "2026-11-28T10:00:00+00:00").write(plan.paths.stage("chat").state)
    monkeypatch.setattr(slurm_client, "queue_of", lambda *_: [by_hand])
    with pytest.raises(UserError, match="queue: 9"):
        prune(plan, delete=True)

    def fail(*_: object) -> list[QueueEntry]:
        raise SlurmCommandError("squeue did not answer within 30 s")

    monkeypatch.setattr(slurm_client, "queue_of", fail)
    with pytest.raises(UserError, match=r"did not answer .*\s+remedy: ask again later"):
        prune(plan, delete=True)
    monkeypatch.setattr(slurm_client, "queue_of", lambda *_: [])
    endpoint = plan.paths.job(JobId("serve", ("base",))).endpoint
    Endpoint("http://127.0.0.1:1/v1", "m", "vllm", None, True, LeaseOwner.this_process()).write(endpoint)
    with pytest.raises(UserError, match="serves an export of run small") as served:
        prune(plan, delete=True)
    assert served.value.hint == f"stop it: longhaul serve {plan.loaded.path} base --stop"
    endpoint.unlink()
    WeightsFolder(old).lease.write_text(json.dumps(asdict(LeaseOwner("another-host", 1, "1"))))
    with pytest.raises(UserError, match="may write to"):
        prune(plan, delete=True)
    assert old.exists()
    WeightsFolder(old).lease.unlink()
    prune(plan, delete=True)
    assert not old.exists()
