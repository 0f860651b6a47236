"""The environment of a job's steps: on Slurm sites the rendezvous of this job, and nothing of an outer launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longhaul.scheduling.allocation import Allocation
from longhaul.scheduling.run_job_steps import StepRunner
from longhaul.scheduling.termination_signals import TerminationSignals
from tests.support.supervised_job import supervise, write_job

SHOWS = "import json, os; json.dump(dict(os.environ), open('environment.json', 'w'))"
LEFT = {"RANK": "3", "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "n7.invalid", "MASTER_PORT": "1"}
OF_SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "41"}


@pytest.fixture(autouse=True)
def started_by_an_outer_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {**LEFT, **OF_SRUN, "NCCL_DEBUG": "INFO"}.items():
        monkeypatch.setenv(name, value)


def environment_of_step() -> dict[str, str]:
    """Return those variables of the test that the step had."""
    found = json.loads(Path("environment.json").read_text())
    return {name: found[name] for name in (*LEFT, *OF_SRUN, "NCCL_DEBUG") if name in found}


def test_a_local_step_has_no_variable_of_an_outer_launcher(tmp_path: Path):
    assert supervise(write_job(tmp_path, SHOWS)) == 0
    assert environment_of_step() == {"SLURM_JOB_ID": "41", "NCCL_DEBUG": "INFO"}


def test_a_step_of_slurm_has_the_rendezvous_of_its_own_job(tmp_path: Path):
    spec = write_job(tmp_path, SHOWS).model_copy(update={"slurm": True})
    steps = StepRunner(spec, Allocation("41", ["n1"]), 1, TerminationSignals(lambda: None))
    assert steps.run_attempt() is None
    port = str(20000 + 41 * 16 + 4 + 1)
    assert environment_of_step() == {**OF_SRUN, "MASTER_ADDR": "n1", "MASTER_PORT": port, "NCCL_DEBUG": "INFO"}
