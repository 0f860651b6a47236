"""The retry policy: only failures that may not recur are retried, and the cause is printed before a run and at its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import pytest

from longhaul.artifacts.job_state import CANCELLED, ENVIRONMENT, NODE, PERMANENT, TRANSIENT, WALLTIME, read_failure
from longhaul.artifacts.paths import JobFolder, RunPaths, run_of
from longhaul.artifacts.quarantine import add_to_quarantine
from longhaul.cli import main
from longhaul.errors import UserError
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.scheduling import retry_policy, slurm_client
from longhaul.scheduling.retry_policy import (
    _print_failures,
    allowed_restarts,
    final_failure,
    job_folder_of,
    refuse_known_failures,
)
from tests.support.supervised_job import folder_of, write_failure, write_job

THIS_MAIN, EARLIER_MAIN = "this main process", "an earlier main process"


@pytest.fixture
def spec(tmp_path: Path) -> LaunchSpec:
    """The job of a run whose lease this main process owns."""
    spec = write_job(tmp_path, "")
    (tmp_path / "results/small.lease.json").write_text(THIS_MAIN)
    return spec


def snakemake_job(spec: LaunchSpec | None) -> SimpleNamespace:
    """Snakemake's view of the job; None: of a job that runs in the main process."""
    params = {"launch": f"{spec.folder}/launch.sh"} if spec else {}
    return SimpleNamespace(params=params, resources={"slurm_partition": "main"})


@pytest.mark.parametrize(
    ("failure_class", "invocation", "restarts"),
    [
        (PERMANENT, THIS_MAIN, 0),
        (PERMANENT, EARLIER_MAIN, 0),
        (ENVIRONMENT, THIS_MAIN, 0),
        (ENVIRONMENT, EARLIER_MAIN, 10),
        (CANCELLED, THIS_MAIN, 0),
        (CANCELLED, EARLIER_MAIN, 10),
        (TRANSIENT, THIS_MAIN, 10),
        (NODE, THIS_MAIN, 10),
        (WALLTIME, THIS_MAIN, 10),
    ],
)
def test_only_failures_that_may_not_recur_are_retried(
    spec: LaunchSpec, failure_class: str, invocation: str, restarts: int
):
    assert allowed_restarts(snakemake_job(spec), 10) == 10
    write_failure(spec, failure_class, invocation)
    assert allowed_restarts(snakemake_job(spec), 10) == restarts
    assert allowed_restarts(snakemake_job(None), 10) == 10, "a rule of the main process"


def test_job_is_not_submitted_again_if_the_quarantine_leaves_too_few_nodes(
    spec: LaunchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    nodes = ["n1", "n2"]
    monkeypatch.setattr(slurm_client, "partition_nodes", lambda partition: nodes if partition == "main" else [])
    spec = spec.model_copy(update={"slurm": True, "nodes": 2})
    spec.write(folder_of(spec).launch_spec)
    write_failure(spec, TRANSIENT, THIS_MAIN)
    assert allowed_restarts(snakemake_job(spec), 10) == 10
    add_to_quarantine(Path(spec.quarantine), {"n2": "slow with most other nodes"}, "train-base, job 5")
    assert allowed_restarts(snakemake_job(spec), 10) == 0
    failure = final_failure(Path(spec.folder))
    assert (
        failure
        and failure.failure_class == ENVIRONMENT
        and failure.cause
        == (
            "2 nodes are needed; partition main has 2, of which 1 is quarantined: "
            "n2 (slow with most other nodes; found by train-base, job 5); why it failed"
        )
    )
    planned = replace(
        failure, failure_class=NODE, next_attempt="attempt 2 of 3", needed_bytes=1, needed_in=str(tmp_path)
    )
    planned.write(JobFolder(Path(spec.folder)).failure)
    assert allowed_restarts(snakemake_job(spec), 10) == 0
    assert final_failure(Path(spec.folder)) == replace(failure, time=ANY), "the same words once, and no next attempt"
    assert failure.remedy.startswith(
        "what to do; remove repaired nodes from results/quarantine.json (longhaul nodes --release NODE), ask for at most 1 node"
    )
    (tmp_path / "results/small.lease.json").write_text("the next main")
    nodes.append("n3")
    assert allowed_restarts(snakemake_job(spec), 10) == 10, "a spare node"


def test_known_failure_is_refused_before_submission_until_an_input_changes(spec: LaunchSpec):
    write_failure(spec, CANCELLED, EARLIER_MAIN)
    refuse_known_failures([snakemake_job(spec), snakemake_job(None)])
    write_failure(spec, PERMANENT, EARLIER_MAIN)
    with pytest.raises(UserError, match=r"train-base failed at .* and would only fail again: why it failed") as refused:
        refuse_known_failures([snakemake_job(None), snakemake_job(spec)])
    assert refused.value.hint.startswith("what to do; ") and f"longhaul retry {spec.folder}" in refused.value.hint
    Path(spec.inputs[0]).write_text("fixed")
    refuse_known_failures([snakemake_job(spec)])


def test_known_failure_is_retried_after_a_data_file_changes(spec: LaunchSpec):
    write_failure(spec, PERMANENT, EARLIER_MAIN)
    with pytest.raises(UserError, match="would only fail again"):
        refuse_known_failures([snakemake_job(spec)])
    Path(spec.data[0]).write_text("fixed")
    refuse_known_failures([snakemake_job(spec)])


def test_retry_verb_deletes_the_failure(spec: LaunchSpec, capsys: pytest.CaptureFixture[str]):
    write_failure(spec, PERMANENT, EARLIER_MAIN)
    with pytest.raises(SystemExit) as ended:
        main(["retry", spec.folder])
    assert not ended.value.code and "why it failed" in capsys.readouterr().out
    assert not folder_of(spec).failure.exists()
    with pytest.raises(SystemExit) as ended:
        main(["retry", spec.folder])
    assert ended.value.code == 2 and "failure.json" in capsys.readouterr().err


def test_failures_of_this_main_process_are_printed_at_exit(spec: LaunchSpec, capsys: pytest.CaptureFixture[str]):
    paths = run_of(Path(spec.folder))
    write_failure(spec, TRANSIENT, EARLIER_MAIN)
    _print_failures(paths)
    assert capsys.readouterr().err == ""
    write_failure(spec, TRANSIENT, THIS_MAIN)
    _print_failures(paths)
    expected = "\ntrain-base failed (transient):\nerror: why it failed\n  remedy: what to do\n"
    assert capsys.readouterr().err == expected


def test_job_folder_is_that_of_the_launch_script(spec: LaunchSpec):
    assert job_folder_of(snakemake_job(spec)) == Path(spec.folder) and job_folder_of(snakemake_job(None)) is None


def test_refusal_has_cause_and_time_until_the_failure_is_retried(spec: LaunchSpec):
    write_failure(spec, PERMANENT, EARLIER_MAIN)
    failure = read_failure(Path(spec.folder))
    assert failure and final_failure(Path(spec.folder)) == failure
    with pytest.raises(UserError) as refused:
        refuse_known_failures([snakemake_job(spec)])
    assert refused.value.message == f"train-base failed at {failure.time} and would only fail again: why it failed"
    assert refused.value.hint == f"what to do; to retry it without a change: longhaul retry {spec.folder}"
    with pytest.raises(SystemExit) as ended:
        main(["retry", spec.folder])
    assert not ended.value.code
    refuse_known_failures([snakemake_job(spec)])


def test_failure_of_a_job_without_a_readable_spec_is_not_final(spec: LaunchSpec):
    write_failure(spec, PERMANENT, EARLIER_MAIN)
    folder_of(spec).launch_spec.write_text("{")
    assert final_failure(Path(spec.folder)) is None


def test_job_folder_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert job_folder_of(SimpleNamespace(params={"launch": "jobs/x/launch.sh"})) == tmp_path / "jobs/x"


def test_print_at_exit_is_registered_with_absolute_paths_and_can_be_cancelled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(retry_policy.atexit, "register", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(retry_policy.atexit, "unregister", lambda *arguments: calls.append(arguments))
    monkeypatch.chdir(tmp_path)
    retry_policy.print_failures_at_exit(RunPaths("small"))
    retry_policy.cancel_print_at_exit()
    assert calls == [(_print_failures, RunPaths("small", RunPaths("small").results.absolute())), (_print_failures,)]


def test_print_at_exit_leaves_stdout_alone(spec: LaunchSpec, capsys: pytest.CaptureFixture[str]):
    write_failure(spec, TRANSIENT, THIS_MAIN)
    _print_failures(run_of(Path(spec.folder)))
    assert capsys.readouterr().out == ""
