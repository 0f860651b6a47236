"""A run that cannot be finished: no retry of what would only fail again, and its reason at once and last of all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from snakemake.jobs import Job

from longhaul.artifacts.job_state import CANCELLED, NODE, PERMANENT, TRANSIENT, WALLTIME, Failure, launch_key
from longhaul.errors import UserError
from longhaul.jobs.specs import LaunchSpec
from longhaul.scheduling.retry_policy import _restart_times, _tell, end_retries, folder_of, refuse_known_failures
from tests.unit.scheduling.test_supervisor import job

THIS_MAIN, EARLIER_MAIN = "this main", "an earlier main"


@pytest.fixture
def made(tmp_path: Path) -> LaunchSpec:
    """A stage's job whose run this main process has the lease of."""
    made = job(tmp_path, "")
    (tmp_path / "results/small.lease.json").write_text(THIS_MAIN)
    return made


def fails(made: LaunchSpec, failure_class: str, main: str = THIS_MAIN) -> None:
    failure = Failure(
        failure_class, "why it failed", "what to do", key=launch_key(made.inputs, made.data), invocation=main
    )
    failure.write(Path(made.folder) / "failure.json")


def snakemakes(made: LaunchSpec | None, attempt: int = 1) -> SimpleNamespace:
    """What Snakemake knows of it."""
    params = {"launch": f"{made.folder}/launch.sh"} if made else {}
    return SimpleNamespace(params=params, attempt=attempt, rule=SimpleNamespace(restart_times=10))


@pytest.mark.parametrize(
    ("failure_class", "main", "restarts"),
    [
        (PERMANENT, THIS_MAIN, 0),
        (PERMANENT, EARLIER_MAIN, 0),
        (CANCELLED, THIS_MAIN, 0),
        (CANCELLED, EARLIER_MAIN, 10),
        (TRANSIENT, THIS_MAIN, 10),
        (NODE, THIS_MAIN, 10),
        (WALLTIME, THIS_MAIN, 10),
    ],
)
def test_what_may_go_well_next_time_is_tried_again_and_nothing_else(
    made: LaunchSpec, failure_class: str, main: str, restarts: int
):
    assert _restart_times(snakemakes(made), 10) == 10
    fails(made, failure_class, main)
    assert _restart_times(snakemakes(made), 10) == restarts
    assert _restart_times(snakemakes(None), 10) == 10, "a rule of this machine"


def test_snakemakes_own_jobs_ask(made: LaunchSpec, monkeypatch: pytest.MonkeyPatch):
    """The property that its scheduler compares with the attempt."""
    monkeypatch.setattr(Job, "restart_times", Job.restart_times)  # put back after the test
    end_retries()
    asked: Any = Job.restart_times
    assert asked.fget(snakemakes(made)) == 10
    fails(made, PERMANENT)
    assert asked.fget(snakemakes(made)) == 0


def test_a_reason_that_stays_is_told_before_anything_is_submitted(made: LaunchSpec):
    fails(made, CANCELLED, EARLIER_MAIN)
    refuse_known_failures([snakemakes(made), snakemakes(None)])
    fails(made, PERMANENT, EARLIER_MAIN)
    with pytest.raises(UserError, match=r"train-base failed at .* and would only fail again: why it failed") as refused:
        refuse_known_failures([snakemakes(None), snakemakes(made)])
    assert refused.value.hint.startswith("what to do; ") and f"longhaul retry {made.folder}" in refused.value.hint
    Path(made.inputs[0]).write_text("mended")
    refuse_known_failures([snakemakes(made)])


def test_who_mends_a_data_file_may_try_again(made: LaunchSpec):
    fails(made, PERMANENT, EARLIER_MAIN)
    with pytest.raises(UserError, match="would only fail again"):
        refuse_known_failures([snakemakes(made)])
    Path(made.data[0]).write_text("mended")
    refuse_known_failures([snakemakes(made)])


def test_the_end_tells_what_failed_in_this_run(made: LaunchSpec, capsys: pytest.CaptureFixture[str]):
    run_folder = Path(made.folder).parents[1]
    fails(made, TRANSIENT, EARLIER_MAIN)
    _tell(run_folder)
    assert capsys.readouterr().err == ""
    fails(made, TRANSIENT)
    _tell(run_folder)
    told = "\ntrain-base failed (transient):\nerror: why it failed\n  remedy: what to do\n"
    assert capsys.readouterr().err == told


def test_the_folder_is_that_of_the_launch_script(made: LaunchSpec):
    assert folder_of(snakemakes(made)) == Path(made.folder) and folder_of(snakemakes(None)) is None
