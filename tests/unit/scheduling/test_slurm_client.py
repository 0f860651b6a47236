"""What Slurm's own words about a job mean. The lines are those of Slurm 22.05 while a job's processes end."""

from __future__ import annotations

import pytest

from longhaul.scheduling.slurm_client import JobInfo, parse_job

AS_STARTED, QUEUED_AGAIN = "Restarts=1", "Restarts=2"
NOT_PREEMPTED, PREEMPTED = "PreemptTime=None", "PreemptTime=2026-11-25T07:22:40"


def job(*words: str) -> JobInfo:
    return parse_job(" ".join(["JobId=7", "Partition=main", "NodeList=n1", "NumNodes=1", *words]))


@pytest.mark.parametrize(
    ("words", "is_cancelled", "is_at_its_limit"),
    [
        (("JobState=RUNNING", "Reason=None", AS_STARTED, NOT_PREEMPTED), False, False),
        (("JobState=CANCELLED", "Reason=None", AS_STARTED, NOT_PREEMPTED), True, False),
        (("JobState=COMPLETING", "Reason=None", AS_STARTED, NOT_PREEMPTED), True, False),
        (("JobState=COMPLETING", "Reason=None", QUEUED_AGAIN, NOT_PREEMPTED), False, False),
        (("JobState=COMPLETING", "Reason=None", QUEUED_AGAIN, PREEMPTED), False, False),
        (("JobState=COMPLETING", "Reason=None", AS_STARTED, PREEMPTED), False, False),
        (("JobState=COMPLETING", "Reason=NodeDown", AS_STARTED, NOT_PREEMPTED), False, False),
        (("JobState=COMPLETING", "Reason=TimeLimit", AS_STARTED, NOT_PREEMPTED), False, True),
        (("JobState=TIMEOUT", "Reason=TimeLimit", AS_STARTED, NOT_PREEMPTED), False, True),
    ],
)
def test_a_job_that_is_ending_says_why(words: tuple[str, ...], is_cancelled: bool, is_at_its_limit: bool):
    found = job(*words)
    assert (found.is_cancelled(restarts=1), found.is_at_its_limit) == (is_cancelled, is_at_its_limit)


def test_a_job_whose_processes_still_end_has_not_ended():
    assert not job("JobState=COMPLETING", "Reason=None", AS_STARTED, NOT_PREEMPTED).has_ended
