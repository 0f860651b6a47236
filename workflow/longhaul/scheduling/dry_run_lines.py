"""Prints what `longhaul run -n` would do: a line for each stage, and the number of jobs by rule.

`snakemake -n` prints Snakemake's own text: inputs, outputs, reasons and shell commands of every job.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from snakemake_interface_logger_plugins.common import LogEvent

from longhaul.artifacts.paths import STAGE_KIND
from longhaul.errors import printable
from longhaul.jobs.job_kind import job_kinds
from longhaul.planning import Plan
from longhaul.report.plan_json import planned_jobs
from longhaul.report.planned_changes import KEPT, UNREADABLE, change_lines, removed_stages, stage_changes

TARGET_RULE = "all"
NOTHING_TO_RUN = "Nothing to be done"
_END = "This was a dry-run"
"""Beginnings of messages of Snakemake."""


def jobs_to_run(stats: Mapping[str, int], planned: int) -> str:
    """Return how many jobs of the plan will run, by rule, and which rules beside them are no jobs. stats: Snakemake's count."""
    counts = {rule: count for rule, count in stats.items() if rule not in (TARGET_RULE, "total")}
    jobs = {rule: count for rule, count in counts.items() if rule in job_kinds()}
    others = {rule: count for rule, count in counts.items() if rule not in jobs}
    line = f"{sum(jobs.values())} of {planned} jobs to run"
    line += f": {_by_rule(jobs)}" if jobs else ""
    return line + (f"; beside them: {_by_rule(others)}" if others else "")


def _by_rule(counts: Mapping[str, int]) -> str:
    return ", ".join(rule if count == 1 else f"{rule} ({count})" for rule, count in counts.items())


class DryRunLines:
    """Collects the records of Snakemake's log in a dry run, and prints the lines at its end; warnings and errors at once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._stats: dict[str, int] = {}
        self._trained: set[str] = set()

    def handle(self, record: logging.LogRecord) -> None:
        """Take a record. Its fields are documented in snakemake_interface_logger_plugins."""
        fields: dict[str, Any] = record.__dict__
        if fields.get("event") == LogEvent.RUN_INFO:
            self._stats = fields["stats"]
        elif fields.get("event") == LogEvent.JOB_INFO and fields["rule_name"] == STAGE_KIND:
            self._trained.add(fields["wildcards"]["stage"])
        elif record.levelno >= logging.WARNING:
            print(printable(record.getMessage()), file=sys.stderr, flush=True)
        elif str(record.msg).startswith((_END, NOTHING_TO_RUN)):
            print("\n".join(self._lines()), flush=True)

    def _lines(self) -> list[str]:
        changes = stage_changes(self._plan)
        # A run up to a target trains the stages alone that the target needs.
        concerned = [
            change for change in changes if change.stage in self._trained or change.action in (KEPT, UNREADABLE)
        ]
        return [
            *change_lines(concerned, new_title="Stages:", removed=removed_stages(self._plan)),
            jobs_to_run(self._stats, len(planned_jobs(self._plan))),
            "This was a dry run: nothing was started.",
        ]
