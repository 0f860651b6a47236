"""Faults that a job has survived: from its history and from the logs of its earlier attempts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from longhaul.artifacts.job_state import TRANSIENT
from longhaul.artifacts.line_record_fields import Event
from longhaul.report.goodput import ATTEMPT_BEGINS
from longhaul.report.search_logs import NOT_NEEDED, Finding, known_problems, match_line

_CONTINUED = f"{NOT_NEEDED}: the job continued"


def past_faults(job: str, history: Path, events: list[Event], in_logs: list[Finding]) -> list[Finding]:
    """Return each fault once, with how often it occurred: first what has ended an attempt, then what has not.

    Effects of other faults are left out where their cause is known.

    history: history.jsonl, of which `events` are
    in_logs: what the logs of earlier attempts show
    """
    found = [*in_logs, *(_of_record(job, history, *reason) for reason in _recorded_reasons(events))]
    ranked = sorted(found, key=lambda finding: (finding.follows, finding.rank))
    ends = [finding for finding in ranked if not finding.continues]
    causes = [finding for finding in ends if not finding.follows] or ends
    causes += [finding for finding in ranked if finding.continues]
    return [_handled(cause, causes) for cause in {finding.cause: finding for finding in reversed(causes)}.values()][
        ::-1
    ]


def _recorded_reasons(events: list[Event]) -> Iterator[tuple[str, bool]]:
    """Yield why each attempt but the last has ended, as its supervisor recorded it, and whether that is known to be the cause."""
    for event, following in pairwise(events):
        begins_again = following["event"] in ATTEMPT_BEGINS
        if event["event"] in ATTEMPT_BEGINS and following["event"] == "running":
            yield "the supervisor left no record of an attempt's end: it was killed, or its node failed", True
        elif event["event"] == "waiting" and begins_again and event.get("reason"):
            yield str(event["reason"]), False
        elif event["event"] == "failed" and begins_again and event.get("reason"):
            failure_class, _, cause = str(event["reason"]).partition(": ")
            yield cause, failure_class != TRANSIENT
        if following["event"] == "restarted" and following.get("reason"):
            yield str(following["reason"]), False


def _of_record(job: str, history: Path, reason: str, is_cause: bool) -> Finding:
    """Return the finding of a recorded reason. Where it only repeats a process' last words, a known problem explains them."""
    problem = None if is_cause else match_line(reason)
    if problem is None:
        return Finding(job, reason, str(history), _CONTINUED)
    rank = known_problems().index(problem)
    cause, remedy = problem["cause"], problem["remedy"]
    return Finding(job, cause, f"{history}: {reason}", remedy, follows=problem.get("follows", False), rank=rank)


def _handled(finding: Finding, all_of_them: list[Finding]) -> Finding:
    count = max(sum(other.cause == finding.cause for other in all_of_them), finding.count)
    again = "" if finding.remedy.startswith(NOT_NEEDED) else f". If it happens again: {finding.remedy}"
    return replace(finding, count=count, remedy=f"{_CONTINUED}{again}", follows=False)
