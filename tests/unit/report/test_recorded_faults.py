"""`longhaul doctor` names the cause of faults whose records and logs were kept; tests/faults asks it in the runs themselves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from longhaul.artifacts.job_state import State, read_state
from longhaul.report.diagnose import diagnose
from tests.faults.expected_diagnoses import EXPECTED, NOT_NOTICED, names_the_cause
from tests.faults.fault_matrix import CASES, OTHER_FAULTS
from tests.faults.record_fault import RECORDED, RECORDS
from tests.support.run_folder import TRAIN, RunFolder

RECORDED_CASES = sorted(path for path in RECORDED.iterdir() if path.is_dir())


def fault_of(case: Path) -> str:
    """Return the fault whose words begin the folder's name; of several, the longest."""
    names = [name for name in EXPECTED if case.name.startswith(name.replace(" ", "-").replace(",", ""))]
    return max(names, key=len)


def replayed(case: Path, root: Path) -> RunFolder:
    """Return a run that holds the records and logs of a case."""
    run = RunFolder(root)
    run.main_process()
    run.state(TRAIN, "done")
    stage, logs = run.paths.job(TRAIN).path, run.paths.attempt_logs(TRAIN).path
    sbatch = root / ".snakemake" / "slurm_logs"
    for folder in (logs, sbatch):
        folder.mkdir(parents=True)
    for path in case.iterdir():
        if path.name in RECORDS:
            shutil.copy(path, stage / path.name)
        elif path.name.startswith("sbatch-"):
            shutil.copy(path, sbatch / path.name.removeprefix("sbatch-"))
        else:
            shutil.copy(path, logs / path.name)
    return run


def test_every_fault_of_the_matrix_has_an_answer_that_doctor_must_give() -> None:
    assert {*(case.name for case in CASES), *OTHER_FAULTS} == {*EXPECTED, *NOT_NOTICED}


@pytest.mark.parametrize("case", RECORDED_CASES, ids=lambda path: path.name)
def test_the_cause_comes_first(case: Path, tmp_path: Path) -> None:
    run = replayed(case, tmp_path)
    assert isinstance(read_state(run.paths.job(TRAIN).path), State)
    findings = diagnose(run.paths, run.status(), tmp_path / ".snakemake" / "slurm_logs")
    first = next((finding for finding in findings if finding.job == str(TRAIN)), None)
    assert first is not None and names_the_cause(fault_of(case), first.cause), findings
