"""Asks Slurm how jobs have ended: its accounting, else slurmctld; report/ended_jobs.py explains the answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime

from longhaul.errors import UserError
from longhaul.report.ended_jobs import EndedJob
from longhaul.scheduling import slurm_client
from longhaul.scheduling.slurm_client import END_STATES, SlurmCommandError


def ended_jobs(job_ids: Sequence[str]) -> dict[str, EndedJob]:
    """Return how jobs have ended, by id. Jobs that Slurm does not know, or that have not ended, are left out."""
    try:
        rows = slurm_client.accounting(job_ids, ("JobIDRaw", "State", "ExitCode", "End", "NodeList"))
    except (SlurmCommandError, UserError):
        return _ended_lately(job_ids)
    # The state of a cancelled job names the user: CANCELLED by 1000.
    states = {job_id: (state.partition(" ")[0], *others) for job_id, state, *others in rows}
    return {
        job_id: EndedJob(*values, source=f"sacct -X -j {job_id}")
        for job_id, values in states.items()
        if values[0] in END_STATES
    }


def _ended_lately(job_ids: Sequence[str]) -> dict[str, EndedJob]:
    """Ask slurmctld, which forgets a job some minutes after its end."""
    found: dict[str, EndedJob] = {}
    for job_id in job_ids:
        with suppress(SlurmCommandError, UserError):
            info = slurm_client.job_info(job_id)
            if info and info.has_ended:
                end = datetime.fromtimestamp(info.end_s).isoformat() if info.end_s else "an unknown time"
                found[job_id] = EndedJob(info.state, info.exit_code, end, info.node_list, f"scontrol show job {job_id}")
    return found
