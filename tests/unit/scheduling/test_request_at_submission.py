"""A job's request at submission: without quarantined nodes, after an active job, and minimal if it would only fail again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from longhaul.artifacts.job_state import PERMANENT, Failure, State, launch_key, utc_now
from longhaul.artifacts.paths import QUARANTINE, JobFolder, JobId
from longhaul.artifacts.quarantine import add_to_quarantine, read_quarantine
from longhaul.cli import main
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_request
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.jobs.launch_files import write_launch_files
from longhaul.planning import Plan
from longhaul.scheduling import request_at_submission, slurm_client
from longhaul.scheduling.node_shortage import NodeShortage
from longhaul.scheduling.request_at_submission import require_enough_nodes, submitted_request
from tests.support.small_configs import LOCAL, plan_of

TRAIN_BASE = JobId("train", ("base",))


def rendered_plan(folder: Path) -> tuple[Plan, JobFolder]:
    """Return a plan whose launch files are written below `folder`, and the folder of its first stage."""
    (folder / "prose.jsonl").write_text('{"text": "a"}\n')
    (folder / "chats.jsonl").write_text('{"messages": []}\n')
    datasets = {
        name: {"kind": kind, "files": [f"{name}.jsonl"]} for name, kind in (("prose", "text"), ("chats", "chat"))
    }
    plan = plan_of(folder, {"datasets": datasets})
    write_launch_files(plan, folder)
    return plan, JobFolder(folder / plan.paths.stage("base").path)


def state(value: str) -> State:
    return State(value, "41", "n1", ["n1"], 1, utc_now())


def test_submission_excludes_quarantined_nodes(tmp_path: Path):
    plan, _ = rendered_plan(tmp_path)
    assert submitted_request(plan, TRAIN_BASE, tmp_path).exclude == ()
    add_to_quarantine(tmp_path / QUARANTINE, dict.fromkeys(["n7", "n7", "n8"], "down"), "job 5")
    assert read_quarantine(tmp_path / QUARANTINE).node_names == ("n7", "n8")
    request = submitted_request(plan, TRAIN_BASE, tmp_path)
    assert request.exclude == ("n7", "n8") and "--exclude=n7,n8" in str(request.as_resources()["slurm_extra"])


@pytest.mark.parametrize(("value", "after"), [("running", "41"), ("waiting", "41"), ("done", None), ("failed", None)])
def test_submission_depends_on_a_job_that_may_be_active(value: str, after: str | None, tmp_path: Path):
    plan, folder = rendered_plan(tmp_path)
    state(value).write(folder.state)
    request = submitted_request(plan, TRAIN_BASE, tmp_path)
    assert request.after_job == after
    assert ("--dependency=afterany:41" in str(request.as_resources()["slurm_extra"])) == (after is not None)


def test_job_that_would_only_fail_again_requests_one_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    plan, folder = rendered_plan(tmp_path)
    key = launch_key(LaunchSpec.read(folder.launch_spec).inputs, [])
    Failure(PERMANENT, "NaN", "", key=key).write(folder.failure)
    request = submitted_request(plan, TRAIN_BASE, tmp_path)
    assert (request.nodes, request.tasks, request.minutes, request.gpus_per_node) == (1, 1, 1, 1)
    folder.deepspeed_config.write_text("{}")
    assert submitted_request(plan, TRAIN_BASE, tmp_path).minutes > 1


def test_broken_quarantine_excludes_nothing_but_refuses_a_new_run(tmp_path: Path):
    plan, _ = rendered_plan(tmp_path)
    (tmp_path / QUARANTINE).write_text("{")
    assert submitted_request(plan, TRAIN_BASE, tmp_path).exclude == ()
    with pytest.raises(UserError, match=r"quarantine\.json is not valid JSON"):
        require_enough_nodes(plan, tmp_path)


@pytest.mark.parametrize("remedy", ["longhaul nodes --release NODE", "name a partition with spare nodes"])
def test_quarantine_that_leaves_too_few_nodes_is_refused_until_there_are_enough(
    remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    plan, _ = rendered_plan(tmp_path)
    nodes = {"gpu": ["n7"], "more": ["n7", "n8"]}
    monkeypatch.setattr(slurm_client, "partition_nodes", nodes.__getitem__)
    add_to_quarantine(tmp_path / QUARANTINE, {"n7": "down"}, "job 5")
    with pytest.raises(UserError) as refused:
        require_enough_nodes(plan, tmp_path)
    assert refused.value.message == (
        "stages.base: 1 node is needed; partition gpu has 1, of which 1 is quarantined: n7 (down; found by job 5)"
    )
    assert str(QUARANTINE) in refused.value.hint and "at most" not in refused.value.hint
    assert remedy in refused.value.hint
    if "--release" in remedy:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            main(["nodes", "--release", "n7"])
        assert not ended.value.code and "removed from" in capsys.readouterr().out
    else:
        site = plan.site.model_copy(
            update={"partitions": tuple(one.model_copy(update={"name": "more"}) for one in plan.site.partitions)}
        )
        plan = replace(plan, loaded=replace(plan.loaded, site=site))
    require_enough_nodes(plan, tmp_path)


def test_request_without_state_or_quarantine_is_that_of_the_plan(tmp_path: Path):
    plan, _ = rendered_plan(tmp_path)
    assert submitted_request(plan, TRAIN_BASE, tmp_path) == replace(job_request(plan, TRAIN_BASE), exclude=())


def test_names_that_are_no_host_names_are_not_excluded(tmp_path: Path):
    plan, _ = rendered_plan(tmp_path)
    names = ["n7", "N-8.x", "9", "-n", ".n", "n 1", "n\n", "", "n_1"]
    add_to_quarantine(tmp_path / QUARANTINE, dict.fromkeys(names, "down"), "job 5")
    assert submitted_request(plan, TRAIN_BASE, tmp_path).exclude == ("n7", "N-8.x", "9", "n_1")


def test_every_stage_must_have_enough_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan, _ = rendered_plan(tmp_path)
    asked: list[tuple[str | None, int]] = []

    def find(partition: str | None, needed: int, quarantine: Path) -> NodeShortage | None:
        asked.append((partition, needed))
        return NodeShortage("few", "n7", "remove repaired nodes") if read_quarantine(quarantine).nodes else None

    monkeypatch.setattr(request_at_submission, "find_shortage", find)
    require_enough_nodes(plan, tmp_path)
    assert asked == [("gpu", 1), ("gpu", 1)]
    add_to_quarantine(tmp_path / QUARANTINE, {"n7": "down"}, "job 5")
    with pytest.raises(UserError) as refused:
        require_enough_nodes(plan, tmp_path)
    assert refused.value.message == "stages.base: few: n7"
    assert refused.value.hint == "remove repaired nodes"
    quarantine = json.loads((tmp_path / QUARANTINE).read_text())
    quarantine["nodes"].clear()
    (tmp_path / QUARANTINE).write_text(json.dumps(quarantine))
    require_enough_nodes(plan, tmp_path)


def test_nodes_are_not_counted_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    local = plan_of(tmp_path, None, LOCAL)
    asked: list[object] = []
    monkeypatch.setattr(request_at_submission, "find_shortage", lambda *arguments: asked.append(arguments))
    require_enough_nodes(local, tmp_path)
    assert asked == []
