"""Refusals by sbatch: what is permanent is recorded and not retried, what is temporary waits longer each time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from snakemake_executor_plugin_slurm.validation import get_forbidden_slurm_options, validate_slurm_extra
from snakemake_interface_common.exceptions import WorkflowError

from longhaul.artifacts.job_state import REFUSED, read_failure
from longhaul.artifacts.quarantine import add_to_quarantine
from longhaul.scheduling import slurm_client
from longhaul.scheduling.retry_policy import allowed_restarts, final_failure
from longhaul.scheduling.sbatch_refusals import read_refusal, record_refusal, warner_of_waiting_jobs
from tests.support.supervised_job import fake_program, write_job

FAILED = "sbatch: error: Batch job submission failed: "
PERMANENT = {
    "Invalid account or account/partition combination specified": "account",
    "Invalid qos specification": "qos",
    "invalid partition specified: nope": "name",
    "User's group not permitted to use this partition": "name",
    "Invalid feature specification": "constraint",
    "Invalid generic resource (gres) specification": "gpu_request",
    "Requested time limit is invalid (missing or exceeds some limit)": "max_minutes",
    "Requested node configuration is not available": "node, max_nodes or name",
    "Requested reservation is invalid": "reservation",
    "Invalid license specification": "sbatch_extra",
    "QOSMaxNodePerJobLimit; Job violates accounting/QOS policy": "qos, max_nodes",
    "Memory specification can not be satisfied": "memory",
    "Invalid GRES specification (with and without type identification)": "gpu_request",
    "Task count specification invalid": "node, max_nodes or name",
    "Invalid --nice value": "sbatch_extra",
    "Invalid --signal specification": "sbatch_extra",
    "Burst Buffer permission denied": "sbatch_extra",
    "No partition specified or system default partition": "name",
}
NO_NODES = "Requested node configuration is not available"
SLOW = "n2 (slow with most other nodes; found by fabric, job 5)"
RELEASE = "remove repaired nodes from results/quarantine.json (longhaul nodes --release NODE)"
VIOLATED = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
# Reason code of a limit that the request alone exceeds -> the remedy's beginning.
LIMITS = {
    "QOSMaxWallDurationPerJobLimit": "correct qos, max_nodes or max_minutes",
    "QOSMaxNodePerUserLimit": "correct qos",
    "QOSMaxGRESPerNode": "correct qos",
    "QOSMinCpuNotSatisfied": "correct qos",
    "QOSGrpNodeLimit": "correct qos",
    "MaxNodePerAccount": "correct qos",
    "AssocMaxWallDurationPerJobLimit": "correct account, max_nodes or max_minutes",
    "AssocGrpGRES": "correct account",
    "AssocGrpCPUMinutesLimit": "the budget",
    "QOSGrpBillingMinutes": "the budget",
}
# Limits of the number of jobs, and texts without a code, which may be about that number.
COUNTS = (
    "QOSMaxSubmitJobPerUserLimit",
    "QOSGrpSubmitJobsLimit",
    "AssocMaxSubmitJobLimit",
    "AssocGrpJobsLimit",
    "MaxSubmitJobsPerAccount",
)
TEMPORARY = (
    VIOLATED,
    "Unable to contact slurm controller (connect failure)",
    "Socket timed out on send/recv operation",
    "Resource temporarily unavailable",
    "Slurm backup controller in standby mode",
    "Operation now in progress",
    "System submissions disabled",
    "Licenses currently unavailable",
    "Required partition not available (inactive or drain)",
    "Partition in DOWN state",
    "Requested partition configuration not available now",
    "Requested reservation not usable now",
    "Job can not start due to maintenance reservation.",
    "Unable to connect to database",
    "something that nobody knows",
)


@pytest.mark.parametrize(("text", "key"), PERMANENT.items())
def test_refusal_of_a_wrong_request_is_permanent_and_names_the_key(text: str, key: str):
    refusal = read_refusal(FAILED + text)
    assert refusal.is_permanent and refusal.remedy.startswith(f"correct {key}")
    assert refusal.reason.endswith(text) and "sbatch" not in refusal.reason


@pytest.mark.parametrize("text", TEMPORARY)
def test_refusal_by_a_limit_or_a_busy_controller_is_temporary(text: str):
    assert not read_refusal(FAILED + text).is_permanent


@pytest.mark.parametrize(("code", "remedy"), LIMITS.items())
def test_refusal_by_a_limit_that_the_request_exceeds_is_permanent(code: str, remedy: str):
    """The text after the code names the submit limit, too, for any limit."""
    refusal = read_refusal(f"sbatch: error: {code}\n{FAILED}{VIOLATED}")
    assert refusal.is_permanent and refusal.remedy.startswith(remedy)


@pytest.mark.parametrize("code", COUNTS)
def test_refusal_by_the_number_of_jobs_is_temporary(code: str):
    """A centre may set the limit 0 for jobs without an account."""
    refusal = read_refusal(f"sbatch: error: {code}\n{FAILED}{VIOLATED}")
    assert not refusal.is_permanent and "name another account in the site file" in refusal.remedy
    assert "account" not in read_refusal(f"{FAILED}Slurm backup controller in standby mode").remedy


def test_reason_is_what_slurm_said_without_the_command():
    said = f"sbatch: error: AssocGrpCPUMinutesLimit\n{FAILED}Invalid qos specification"
    message = f"SLURM sbatch failed. The error message was '{said}'.\n    sbatch call:\n        sbatch --time 5\n"
    assert (
        read_refusal(message).reason
        == "AssocGrpCPUMinutesLimit; Batch job submission failed: Invalid qos specification"
    )


def job(folder: Path, attempt: int = 1) -> SimpleNamespace:
    """Return Snakemake's view of a job with this folder."""
    resources = {"slurm_partition": "main"}
    return SimpleNamespace(params={"launch": f"{folder}/launch.sh"}, resources=resources, attempt=attempt)


def test_permanent_refusal_ends_the_retries_of_this_main_process_only(tmp_path: Path):
    folder = Path(write_job(tmp_path, "").folder)
    lease = tmp_path / "results/small.lease.json"
    lease.write_text("this main")
    assert record_refusal(job(folder), f"{FAILED}Invalid qos specification") == 0
    failure = final_failure(folder)
    assert failure and failure.failure_class == REFUSED
    assert failure.cause == "Slurm refused the job: Batch job submission failed: Invalid qos specification"
    assert "sacctmgr show qos" in failure.remedy
    lease.write_text("the next main")
    assert final_failure(folder) is None, "the user may have corrected the site file"


def refusals_of_the_plugin() -> list[str]:
    """Return how the plugin reports each option that its check of slurm_extra finds."""
    found: list[str] = []
    for pattern in get_forbidden_slurm_options():
        extra = pattern.partition("|")[0].replace(r"[=\s]", "=")
        with pytest.raises(WorkflowError) as refused:
            validate_slurm_extra(SimpleNamespace(resources=SimpleNamespace(slurm_extra=extra)))
        found.append(f"Job submission failed with exception: {refused.value}")
    return found


def test_option_that_the_plugin_refuses_is_not_retried_and_is_not_blamed_on_slurm(tmp_path: Path):
    folder = Path(write_job(tmp_path, "").folder)
    for message in refusals_of_the_plugin():
        assert record_refusal(job(folder), message) == 0, message
        failure = read_failure(folder)
        assert failure and failure.failure_class == REFUSED
        assert failure.cause.startswith("Snakemake's Slurm plugin refused the job: ")
        assert failure.remedy == "remove this option from sbatch_extra of the partition in the site file"


@pytest.mark.parametrize(
    ("nodes", "text", "cause", "remedy"),
    [
        (["n1", "n2", "n3"], NO_NODES, f"3 nodes are needed; partition main has 3, of which 1 is quarantined: {SLOW}; ",
         f"{RELEASE}, ask for at most 2 nodes in the config"),
        ([], NO_NODES, f"the job excludes quarantined nodes: {SLOW}; ",
         f"{RELEASE}, ask for fewer nodes in the config"),
        (["n1", "n3"], "Invalid node name specified", f"the job excludes quarantined nodes: {SLOW}; ",
         "release quarantined nodes that the cluster no longer has: longhaul nodes --release NODE; "),
        ([], "Invalid qos specification", "", "correct qos"),
    ],
)  # fmt: skip
def test_refusal_for_want_of_nodes_names_the_quarantine_first(
    nodes: list[str], text: str, cause: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_client, "partition_nodes", lambda partition: nodes)
    spec = write_job(tmp_path, "").model_copy(update={"slurm": True, "nodes": 3})
    spec.write(Path(spec.folder) / "launch.json")
    assert record_refusal(job(Path(spec.folder)), f"{FAILED}{text}") == 0
    failure = read_failure(Path(spec.folder))
    assert failure and "is quarantined" not in failure.cause and "excludes" not in failure.cause, (
        "no node is quarantined"
    )
    add_to_quarantine(Path(spec.quarantine), {"n2": "slow with most other nodes"}, "fabric, job 5")
    record_refusal(job(Path(spec.folder)), f"{FAILED}{text}")
    failure = read_failure(Path(spec.folder))
    assert failure and failure.failure_class == REFUSED and failure.remedy.startswith(remedy)
    assert failure.cause == f"{cause}Slurm refused the job: Batch job submission failed: {text}"


def test_temporary_refusal_waits_longer_each_time_says_why_and_is_retried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = Path(write_job(tmp_path, "").folder)
    (tmp_path / "results/small.lease.json").write_text("this main")
    said = f"{FAILED}QOSMaxSubmitJobPerUserLimit"
    assert [record_refusal(job(folder, attempt), said) for attempt in (1, 2, 3, 9)] == [15, 30, 60, 600]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "QOSMaxSubmitJobPerUserLimit; next try in 15 s" in lines[0]
    assert final_failure(folder) is None and allowed_restarts(job(folder), 10) == 10
    failure = read_failure(folder)
    assert failure and "QOSMaxSubmitJobPerUserLimit" in failure.as_text()


def test_waiting_job_that_cannot_start_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    queue = "7 AccountNotAllowed\\n8 Priority\\n9 Dependency\\n10 QOSMaxNodePerJobLimit\\n11 QOSMaxJobsPerUserLimit"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "squeue", f"#!/bin/sh\nprintf '{queue}\\n'\n"))
    warn = warner_of_waiting_jobs()
    warn("run")
    warn("run")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == ["7", "10"]
    assert "Slurm's reason: AccountNotAllowed. correct account" in lines[0]


def test_provisional_reason_is_printed_only_if_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Slurm gives a submitted job beyond a partition's limit the reason PartitionConfig, and names the limit a moment later."""
    monkeypatch.setenv("PATH", fake_program(tmp_path, "squeue", f"#!/bin/sh\ncat '{tmp_path}/queue'\n"))
    warn = warner_of_waiting_jobs()
    for queue in ("7 PartitionConfig\n8 PartitionConfig\n", "7 PartitionTimeLimit\n8 PartitionConfig\n"):
        assert not capsys.readouterr().err
        (tmp_path / "queue").write_text(queue)
        warn("run")
    lines = capsys.readouterr().err.splitlines()
    assert "job 7 " in lines[0] and "PartitionTimeLimit. correct max_minutes" in lines[0]
    assert "job 8 " in lines[1] and "PartitionConfig. correct name, account, qos, max_nodes or max_minutes" in lines[1]
