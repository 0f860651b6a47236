"""Finds the causes for `longhaul doctor`: failure.json, advice for each Slurm pending reason, patterns in logs; formats the
findings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, NotRequired

import yaml
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from longhaul.artifacts.paths import JobFolder, RunPaths
from longhaul.artifacts.record_types import read_events
from longhaul.errors import printable
from longhaul.report.run_status import DONE, FAILED, INTERRUPTED, QUEUED, RunStatus

KNOWN_PROBLEMS = Path(__file__).with_name("known_problems.yaml")
_LOG_BYTES = 2 * 2**20
"""Largest part of a log that is searched, from its end."""
_LINE_CHARACTERS = 300
_HANDLED = ("restarted", "waiting")
_WAITS = {
    "QOS": "a limit of the job's QOS is reached: wait, or choose another QOS in the site file",
    "Assoc": "a limit of your account is reached: wait, or ask for a larger one",
    "PartitionTimeLimit": "minutes is above the partition's limit: lower it",
    "PartitionNodeLimit": "the job needs more nodes than the partition allows: use fewer, or another partition",
    "ReqNodeNotAvail": "nodes that the job needs are down or reserved: see `scontrol show reservation`",
    "BadConstraints": "no node has what the site file asks for: check constraint, memory and GPUs",
    "Resources": "the nodes are busy: wait",
    "Priority": "other jobs are in front: wait",
    "Dependency": "it waits for another job",
}
"""Beginning of Slurm's reason for a pending job -> what to do. https://slurm.schedmd.com/job_reason_codes.html"""


class KnownProblem(TypedDict):
    """One entry of known_problems.yaml."""

    name: str
    pattern: str
    cause: str
    remedy: str
    source: str
    follows: NotRequired[bool]


@dataclass(frozen=True)
class Finding:
    """One cause. evidence: `file:line: text`, or the record that it was read from."""

    job: str
    cause: str
    evidence: str
    remedy: str
    count: int = 1
    follows: bool = False


@cache
def known_problems() -> tuple[KnownProblem, ...]:
    """Return the entries of known_problems.yaml."""
    entries = yaml.safe_load(KNOWN_PROBLEMS.read_text(encoding="utf-8"))
    return tuple(TypeAdapter(list[KnownProblem]).validate_python(entries))


def diagnose(paths: RunPaths, status: RunStatus, slurm_logs: Path) -> list[Finding]:
    """Return what explains the state of a run: recorded failures first, then what logs show, then what was handled.

    slurm_logs: folder of the logs that the Slurm plugin asks sbatch to write; it may be absent
    """
    logs = _logs(paths, status, slurm_logs)
    in_logs = [finding for job, path in logs for finding in search_log(job, path)]
    return [
        *_recorded_failures(status),
        *_waiting_jobs(status),
        *sorted(in_logs, key=lambda finding: finding.follows),
        *_handled_faults(status),
    ]


def _recorded_failures(status: RunStatus) -> Iterator[Finding]:
    for job in status.jobs:
        if job.state in (FAILED, INTERRUPTED):
            record = JobFolder(Path(job.folder))
            evidence = record.failure if job.state == FAILED else record.state
            remedy = job.remedy or "run the same command again: the job continues from its last checkpoint"
            yield Finding(job.name, job.detail, str(evidence), remedy)


def _waiting_jobs(status: RunStatus) -> Iterator[Finding]:
    for job in status.jobs:
        if job.state == QUEUED:
            reason = job.detail.removeprefix("waits: ")
            remedy = next(
                (text for start, text in _WAITS.items() if reason.startswith(start)), "wait, or ask the administrators"
            )
            yield Finding(
                job.name, f"the job waits in Slurm's queue: {reason}", f"squeue, job {job.slurm_job_id}", remedy
            )


def _handled_faults(status: RunStatus) -> Iterator[Finding]:
    """Yield the faults that a restart or a requeue has already dealt with."""
    for job in status.jobs:
        history = JobFolder(Path(job.folder)).history
        reasons = [
            event["reason"] for event in read_events(history) if event["event"] in _HANDLED and event.get("reason")
        ]
        for reason in dict.fromkeys(reasons):
            yield Finding(job.name, reason, str(history), "none is needed: the job continued", reasons.count(reason))


def _logs(paths: RunPaths, status: RunStatus, slurm_logs: Path) -> list[tuple[str, Path]]:
    """Return (job, file) of the logs of all jobs that are not done: the job's own, and those of sbatch by job id."""
    done = {job.name for job in status.jobs if job.state == DONE}
    names = {job.log: job.name for job in status.jobs}
    own = [(names.get(str(path), path.stem), path) for path in sorted(paths.logs.rglob("*.log"))]
    by_id = {path.stem: path for path in slurm_logs.rglob("*.log")}
    ids: list[tuple[str, str]] = []
    for job in status.jobs:
        events = read_events(JobFolder(Path(job.folder)).history)
        ids += dict.fromkeys((job.name, str(event["job_id"])) for event in events if event.get("job_id"))
    of_sbatch = [(name, by_id[job_id]) for name, job_id in ids if job_id in by_id]
    return [(name, path) for name, path in own + of_sbatch if name not in done]


def search_log(job: str, path: Path) -> list[Finding]:
    """Return the known problems that a log shows, each once with its first line. Only the last 2 MiB are searched."""
    first_line, text = _end_of(path)
    found: dict[str, tuple[KnownProblem, str]] = {}
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), first_line):
        if problem := match_line(line):
            counts[problem["name"]] = counts.get(problem["name"], 0) + 1
            found.setdefault(problem["name"], (problem, f"{path}:{number}: {line.strip()[:_LINE_CHARACTERS]}"))
    return [
        Finding(job, problem["cause"], evidence, problem["remedy"], counts[name], problem.get("follows", False))
        for name, (problem, evidence) in found.items()
    ]


def match_line(line: str) -> KnownProblem | None:
    """Return the first known problem that a line shows, in the order of the file."""
    if not _any_problem().search(line):
        return None
    return next(problem for problem in known_problems() if _compiled(problem["pattern"]).search(line))


@cache
def _any_problem() -> re.Pattern[str]:
    """Return one expression for all problems: nearly every line of a log is decided with one search."""
    return _compiled("|".join(f"(?:{problem['pattern']})" for problem in known_problems()))


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _end_of(path: Path) -> tuple[int, str]:
    """Return the number of the first line that is searched, and the text from there on."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            start = max(0, size - _LOG_BYTES)
            stream.seek(0)
            skipped = _line_breaks(stream, start)
            return skipped + 1, stream.read().decode("utf-8", errors="replace")
    except OSError:
        return 1, ""


def _line_breaks(stream: BinaryIO, size: int) -> int:
    """Return how many line breaks the next `size` bytes hold."""
    count, left = 0, size
    while left and (part := stream.read(min(left, 2**20))):
        count, left = count + part.count(b"\n"), left - len(part)
    return count


def findings_text(findings: list[Finding], status: RunStatus) -> str:
    """Return the findings for people, the most likely cause first."""
    if not findings:
        return f"No problem found: run {status.run} is {status.state}."
    return "\n\n".join(_finding_text(number, finding) for number, finding in enumerate(findings, 1))


def _finding_text(number: int, finding: Finding) -> str:
    often = f" ({finding.count} times)" if finding.count > 1 else ""
    effect = " This is usually the effect of another problem." if finding.follows else ""
    return printable(
        f"{number}. {finding.job}: {finding.cause}{often}.{effect}\n"
        f"   evidence: {finding.evidence}\n"
        f"   remedy: {finding.remedy}"
    )
