"""A job joins the allocation that Slurm gave it; one that does not fit its plan is refused until the remedy is followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.artifacts.paths import JobFolder, JobId
from longhaul.errors import UserError
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.jobs.launch_files import write_launch_files
from longhaul.scheduling import allocation
from longhaul.scheduling.allocation import join_allocation
from tests.support.small_configs import plan_of
from tests.support.supervised_job import fake_program

SCONTROL = """#!/bin/sh
case "$*" in
  *"show job 7") echo "JobId=7 JobState=RUNNING Partition=gpu NumNodes={nodes} NodeList=n[1-{nodes}]";;
  *"show job"*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;
  *"show hostnames"*) seq -f n%g {nodes};;
esac
"""
SILENT = "#!/bin/sh\necho 'Unable to contact slurm controller (connect failure)' >&2; exit 1\n"


@pytest.fixture
def no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def rendered(folder: Path, nodes: int) -> LaunchSpec:
    """Return the launch spec of a check on so many nodes, beside the job.sbatch that a user may submit."""
    plan = plan_of(folder, {"checks.nodes": nodes})
    write_launch_files(plan, folder)
    job = JobFolder(folder / plan.paths.job(JobId("environment")).path)
    assert job.sbatch_script.exists()
    return LaunchSpec.read(job.launch_spec)


def test_a_job_outside_of_an_allocation_is_refused_until_it_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_allocation: None
):
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", SCONTROL.format(nodes=1)))
    spec = rendered(tmp_path, 1)
    for job_id, message in ((None, "SLURM_JOB_ID is not set"), ("5", "job 5 is unknown to Slurm")):
        if job_id:
            monkeypatch.setenv("SLURM_JOB_ID", job_id)
        with pytest.raises(
            UserError, match=rf"{message}.*\s+remedy: submit job\.sbatch with sbatch, or run the config"
        ):
            join_allocation(spec)
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # as in a submitted job
    assert join_allocation(spec).nodes == ["n1"]


def test_an_allocation_of_another_size_is_refused_until_the_sizes_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", SCONTROL.format(nodes=2)))
    with pytest.raises(
        UserError, match=r"has 2 nodes; the plan says 1\s+remedy: drop --set-resources, or set nodes in"
    ):
        join_allocation(rendered(tmp_path, 1))
    assert join_allocation(rendered(tmp_path, 2)).nodes == ["n1", "n2"]
    fake_program(tmp_path, "scontrol", SCONTROL.format(nodes=1))  # what the plan asks for, without --set-resources
    assert join_allocation(rendered(tmp_path, 1)).nodes == ["n1"]


def test_a_silent_slurm_is_reported_until_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocation, "_SLURM_TIMEOUT_S", -1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", SILENT))
    with pytest.raises(UserError, match=r"Slurm has not answered .* Unable to contact.*\s+remedy: check slurmctld"):
        join_allocation(rendered(tmp_path, 1))
    fake_program(tmp_path, "scontrol", SCONTROL.format(nodes=1))
    assert join_allocation(rendered(tmp_path, 1)).partition == "gpu"
