"""Verb `longhaul site check`: asks Slurm with `sbatch --test-only` whether it accepts each job of a run."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longhaul.errors import UserError, printable
from longhaul.jobs.job_kind import job_request, jobs_of
from longhaul.planning import Plan
from longhaul.planning.slurm_request import SlurmRequest, controller_request
from longhaul.scheduling.sbatch_refusals import read_refusal
from longhaul.scheduling.slurm_client import SlurmCommandError, try_submission


@dataclass(frozen=True)
class SlurmAnswer:
    """Slurm's answer to the request of some jobs. remedy: empty where the request is accepted."""

    jobs: str
    request: SlurmRequest
    text: str
    remedy: str = ""

    @property
    def is_accepted(self) -> bool:
        return not self.remedy


def check_site(plan: Plan) -> list[SlurmAnswer]:
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
    return [_ask(", ".join(names), request) for request, names in jobs.items()]


def _ask(jobs: str, request: SlurmRequest) -> SlurmAnswer:
    options = [f"{name}={value}" if value else name for name, value in request.as_sbatch().items()]
    try:
        return SlurmAnswer(jobs, request, try_submission(options))
    except SlurmCommandError as error:
        refusal = read_refusal(str(error))
        return SlurmAnswer(jobs, request, refusal.reason, refusal.remedy)


def print_answers(answers: list[SlurmAnswer]) -> None:
    """Print a table of the answers, and a remedy for each refusal."""
    table = Table(title="What Slurm says to each request", title_justify="left")
    for column in ("jobs", "partition", "account", "nodes", "accepted", "Slurm's answer"):
        table.add_column(column, overflow="fold")
    for answer in answers:
        request = answer.request
        asked = (request.partition or "-", request.account or "-", str(request.nodes))
        line = (answer.jobs, *asked, "yes" if answer.is_accepted else "NO", answer.text)
        table.add_row(*(Text(printable(cell)) for cell in line))
    console = Console(width=120)
    console.print(table)
    for answer in answers:
        if not answer.is_accepted:
            console.print(f"{answer.jobs}: {answer.remedy}", markup=False)
