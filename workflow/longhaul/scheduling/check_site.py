"""Asks Slurm whether it accepts each kind of job of a run, without submitting one."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_request, jobs_of
from longhaul.planning import Plan
from longhaul.planning.slurm_request import SlurmRequest, controller_request
from longhaul.scheduling.sbatch_refusals import read_refusal
from longhaul.scheduling.slurm_client import SlurmCommandError, try_submission


@dataclass(frozen=True)
class Verdict:
    """Slurm's answer to the request of some jobs. remedy: empty where the request is accepted."""

    jobs: str
    request: SlurmRequest
    answer: str
    remedy: str = ""

    @property
    def is_accepted(self) -> bool:
        return not self.remedy


def check_site(plan: Plan) -> list[Verdict]:
    """Return Slurm's answer to every different request of a run, and to that of the controller.

    Raises:
        UserError: the site has no Slurm.
    """
    if plan.site.scheduler != "slurm":
        raise UserError(f"site {plan.site.name} has scheduler: local", "name a config whose site uses Slurm")
    jobs: dict[SlurmRequest, list[str]] = {}
    for job in jobs_of(plan):
        jobs.setdefault(job_request(plan, job), []).append(str(job))
    jobs.setdefault(controller_request(plan.site), []).append("controller")
    return [_verdict(", ".join(names), request) for request, names in jobs.items()]


def _verdict(jobs: str, request: SlurmRequest) -> Verdict:
    options = [f"{name}={value}" if value else name for name, value in request.as_sbatch().items()]
    try:
        return Verdict(jobs, request, try_submission(options))
    except SlurmCommandError as error:
        refusal = read_refusal(str(error))
        return Verdict(jobs, request, refusal.reason, refusal.remedy)


def print_verdicts(verdicts: list[Verdict]) -> None:
    """Print a table of the answers, and a remedy for each refusal."""
    table = Table(title="What Slurm says to each request", title_justify="left")
    for column in ("jobs", "partition", "account", "nodes", "accepted", "Slurm's answer"):
        table.add_column(column, overflow="fold")
    for verdict in verdicts:
        request = verdict.request
        asked = (request.partition or "-", request.account or "-", str(request.nodes))
        table.add_row(verdict.jobs, *asked, "yes" if verdict.is_accepted else "NO", verdict.answer)
    console = Console(width=120)
    console.print(table)
    for verdict in verdicts:
        if not verdict.is_accepted:
            console.print(f"{verdict.jobs}: {verdict.remedy}", markup=False)
