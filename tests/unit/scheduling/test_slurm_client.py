"""Reading of Slurm's answers. The lines are those of Slurm 22.05 while a job's processes end."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.errors import UserError
from longhaul.scheduling import slurm_client
from longhaul.scheduling.slurm_client import JobInfo, SlurmCommandError, parse_job
from tests.support.supervised_job import fake_program

AS_STARTED, REQUEUED = "Restarts=1", "Restarts=2"
NOT_PREEMPTED, PREEMPTED = "PreemptTime=None", "PreemptTime=2026-11-25T07:22:40"
LOGGED = '#!/bin/sh\necho "$0 $*" >> "{log}"\n'


def job(*fields: str) -> JobInfo:
    return parse_job(" ".join(["JobId=7", "Partition=main", "NodeList=n1", "NumNodes=1", *fields]))


@pytest.mark.parametrize(
    ("fields", "was_cancelled", "reached_time_limit"),
    [
        (("JobState=RUNNING", "Reason=None", AS_STARTED, NOT_PREEMPTED), False, False),
        (("JobState=CANCELLED", "Reason=None", AS_STARTED, NOT_PREEMPTED), True, False),
        (("JobState=COMPLETING", "Reason=None", AS_STARTED, NOT_PREEMPTED), True, False),
        (("JobState=COMPLETING", "Reason=None", REQUEUED, NOT_PREEMPTED), False, False),
        (("JobState=COMPLETING", "Reason=None", REQUEUED, PREEMPTED), False, False),
        (("JobState=COMPLETING", "Reason=None", AS_STARTED, PREEMPTED), False, False),
        (("JobState=COMPLETING", "Reason=NodeDown", AS_STARTED, NOT_PREEMPTED), False, False),
        (("JobState=COMPLETING", "Reason=TimeLimit", AS_STARTED, NOT_PREEMPTED), False, True),
        (("JobState=TIMEOUT", "Reason=TimeLimit", AS_STARTED, NOT_PREEMPTED), False, True),
    ],
)
def test_cause_of_an_ending_job_is_recognized(fields: tuple[str, ...], was_cancelled: bool, reached_time_limit: bool):
    found = job(*fields)
    assert (found.was_cancelled(restarts_at_start=1), found.reached_time_limit) == (was_cancelled, reached_time_limit)


def test_job_whose_processes_still_end_has_not_ended():
    assert not job("JobState=COMPLETING", "Reason=None", AS_STARTED, NOT_PREEMPTED).has_ended


@pytest.mark.parametrize(("node_list", "never_started"), [("(null)", True), ("", True), ("n[1-2]", False)])
def test_job_without_nodes_has_never_started(node_list: str, never_started: bool):
    assert parse_job(f"JobId=7 JobState=CANCELLED NumNodes=2 NodeList={node_list}").never_started == never_started


def test_unknown_job_differs_from_an_error_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def answer(text: str) -> None:
        script = f"#!/bin/sh\necho '{text}' >&2; exit 1\n"
        monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", script))

    answer("slurm_load_jobs error: Invalid job id specified")
    assert slurm_client.job_info("7") is None and slurm_client.job_has_ended("7")
    answer("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    with pytest.raises(SlurmCommandError, match="Unable to contact"):
        slurm_client.job_info("7")
    assert not slurm_client.job_has_ended("7")


def test_missing_slurm_command_is_named_until_it_is_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="scontrol is not on the PATH of this node"):
        slurm_client.job_info("7")
    fake_program(tmp_path, "scontrol", "#!/bin/sh\necho JobId=7 JobState=RUNNING NumNodes=1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")  # as `module load` sets it
    assert slurm_client.job_info("7")


def test_requeue_excludes_nodes_after_the_job_is_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Slurm refuses to change the nodes of a running job, so the order matters."""
    log = tmp_path / "log"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", LOGGED.format(log=log)))
    assert slurm_client.requeue("7", ["n2", "n3"]) == ""
    calls = [line.split(maxsplit=1)[1] for line in log.read_text().splitlines()]
    assert calls == ["requeue 7", "update JobId=7 ExcNodeList=n2,n3"]


def test_scontrol_that_slurms_signal_ends_is_called_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Slurm ends the processes of a requeued job, of which scontrol is one. The first update is killed, the second works."""
    log = tmp_path / "log"
    killed = f'[ "$1" = update ] && [ $(grep -c update {log}) = 1 ] && kill -TERM $$\nexit 0\n'
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", LOGGED.format(log=log) + killed))
    assert slurm_client.requeue("7", ["n2"]) == ""
    calls = [line.split(maxsplit=1)[1] for line in log.read_text().splitlines()]
    assert calls == ["requeue 7", *["update JobId=7 ExcNodeList=n2"] * 2]


def test_nodes_that_slurm_does_not_exclude_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(slurm_client, "_EXCLUDE_TIMEOUT_S", 0.0)
    script = '#!/bin/sh\n[ "$1" = requeue ] || { echo "Invalid node name" >&2; exit 1; }\n'
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", script))
    assert slurm_client.requeue("7", ["n2"]) == ""
    assert "warning: n2 could not be excluded: Invalid node name" in capsys.readouterr().out


def test_names_of_jobs_may_have_any_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """squeue lists all jobs of the user, and Slurm takes names as bytes: here the Latin-1 of übung."""
    line = r"7|RUNNING|None|N/A|\374bung|(null)|/work\n8|PENDING|Priority|N/A|other|(null)|/work\n"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "squeue", f"#!/bin/sh\nprintf '{line}'\n"))
    for locale in ("C", "en_US.ISO-8859-1"):
        monkeypatch.setenv("LC_ALL", locale)
        assert [entry.name for entry in slurm_client.queue_of(0, "/work")] == ["\N{REPLACEMENT CHARACTER}bung", "other"]


def test_preempted_jobs_of_a_run_are_those_that_squeue_lists_as_preempted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Slurm lists a preempted job that it does not queue again for MinJobAge."""
    log = tmp_path / "log"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "squeue", LOGGED.format(log=log) + "echo 7; echo 9\n"))
    assert slurm_client.preempted_jobs("run-1") == ["7", "9"]
    assert log.read_text().split()[1:] == ["--noheader", "--name=run-1", "--states=PREEMPTED", "--format=%i"]


def test_no_job_is_preempted_if_slurm_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", fake_program(tmp_path, "squeue", "#!/bin/sh\nexit 1\n"))
    assert slurm_client.preempted_jobs("run-1") == []


def test_refused_requeue_returns_slurms_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = "#!/bin/sh\necho 'Requested operation is presently disabled' >&2; exit 1\n"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "scontrol", script))
    assert slurm_client.requeue("7", ["n2"]) == "Requested operation is presently disabled"


def test_down_failing_and_not_responding_nodes_are_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    states = "n1 idle\nn2 down\nn3 mixed*\nn4 draining\nn5 drained*\nn6 failing\nn7 allocated\n"
    monkeypatch.setenv("PATH", fake_program(tmp_path, "sinfo", f"#!/bin/sh\ncat <<END\n{states}END\n"))
    assert slurm_client.down_nodes([f"n{index}" for index in range(1, 8)]) == ["n2", "n3", "n5", "n6"]


def test_node_on_which_srun_fails_is_unresponsive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = '#!/bin/sh\ncase "$*" in *--nodelist=n2*) exit 1;; *--nodelist=n3*) exec sleep 60;; esac\n'
    monkeypatch.setenv("PATH", fake_program(tmp_path, "srun", script))
    assert slurm_client.unresponsive_nodes(["n1", "n2", "n3"], timeout_s=1.0) == ["n2", "n3"]
