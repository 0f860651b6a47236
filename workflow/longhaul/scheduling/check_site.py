"""Verb `longhaul site check`: asks Slurm with `sbatch --test-only` about each job of a run, or of a site file alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longhaul.artifacts.paths import JobId
from longhaul.config.load_config import LoadedConfig, load_config
from longhaul.config.serve_config import Serve
from longhaul.config.shipped_files import data_root
from longhaul.config.site_config import Site
from longhaul.config.stage_config import Parallel, Stage
from longhaul.errors import UserError, printable
from longhaul.jobs.job_kind import job_request, jobs_of, jobs_on_demand
from longhaul.planning import Plan, build_plan
from longhaul.planning.slurm_request import SlurmRequest, controller_request
from longhaul.scheduling.sbatch_refusals import ASK_AGAIN, read_refusal
from longhaul.scheduling.slurm_client import SlurmCommandError, accounts_are_checked, try_submission

CONTROLLER = "controller"
"""Name of the optional job in which the main process may run."""
_EXAMPLE_MINUTES = 30
_NO_CLUSTER = "Could not establish a configuration source"
"""Part of the error of Slurm's commands on a machine that belongs to no cluster."""


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


def check_run(plan: Plan) -> list[SlurmAnswer]:
    """Return Slurm's answer to every different request of a run, and to that of the controller.

    Raises:
        UserError: the site has no Slurm.
    """
    _require_slurm(plan.site)
    return _ask_each(_requests(plan))


def check_site(site: Site) -> list[SlurmAnswer]:
    """Return Slurm's answer to every kind of job on two nodes, and to the largest training that the site file allows.

    Raises:
        UserError: the site has no Slurm.
    """
    _require_slurm(site)
    plan = example_plan(site)
    requests = _requests(plan, lambda job: job.kind)
    partition = site.partition_for("gpu")
    train = next(job_request(plan, job) for job in jobs_of(plan) if job.kind == "train")
    largest = replace(train, nodes=partition.max_nodes, minutes=partition.max_minutes or train.minutes)
    requests.setdefault(largest, []).append("train, with max_nodes and max_minutes")
    return _ask_each(requests)


def example_plan(site: Site) -> Plan:
    """Return the plan of the demo at a site, over two nodes where it has them.

    It has every kind of job but serve_check, which asks for what `serve` asks for, and looks for the engine on this machine.
    """
    partition = site.partition_for("gpu")
    nodes, ranks = min(2, partition.max_nodes), site.node.gpus or min(2, site.node.cpus)
    changes = {
        "nodes": nodes,
        "gpus_per_node": ranks,
        "micro_batch_size": 1,
        "global_batch_size": nodes * ranks,
        "parallel": Parallel(),
        "minutes": min(_EXAMPLE_MINUTES, partition.max_minutes or _EXAMPLE_MINUTES),
    }
    demo = load_config(data_root() / "config" / "config.yaml")
    served = {"serve": Serve()}
    stages: tuple[Stage, ...] = tuple(
        stage.model_copy(update=changes | (served if stage.export != "none" else {})) for stage in demo.config.stages
    )
    config = demo.config.model_copy(
        update={
            "stages": stages,
            "checks": demo.config.checks.model_copy(update={"nodes": None}),
            "data_jobs": dict.fromkeys(demo.config.datasets, 2),
            "scale_test": demo.config.scale_test.model_copy(update={"nodes": (1,)}),
        }
    )
    return build_plan(LoadedConfig(config, site, demo.path, demo.site_path))


def _require_slurm(site: Site) -> None:
    if site.scheduler != "slurm":
        raise UserError(f"site {site.name} has scheduler: local", "name a config or a site file that uses Slurm")


def _requests(plan: Plan, name: Callable[[JobId], str] = str) -> dict[SlurmRequest, list[str]]:
    """Return the names of a plan's jobs by their request, with the controller."""
    jobs: dict[SlurmRequest, list[str]] = {}
    servers = [job for job in jobs_on_demand(plan) if plan.stage(job.names[0]).serving]
    for job in (*jobs_of(plan), *servers):
        jobs.setdefault(job_request(plan, job), []).append(name(job))
    jobs.setdefault(controller_request(plan.site), []).append(CONTROLLER)
    return jobs


def _ask_each(requests: dict[SlurmRequest, list[str]]) -> list[SlurmAnswer]:
    return [_ask(", ".join(dict.fromkeys(names)), request) for request, names in requests.items()]


def _ask(jobs: str, request: SlurmRequest) -> SlurmAnswer:
    try:
        return SlurmAnswer(jobs, request, try_submission(request.options()))
    except SlurmCommandError as error:
        if _NO_CLUSTER in str(error):
            raise UserError(
                f"sbatch finds no cluster from this machine: {_NO_CLUSTER}", "call this on a login node"
            ) from None
        refusal = read_refusal(str(error), ASK_AGAIN)
        return SlurmAnswer(jobs, request, refusal.reason, refusal.remedy)


def print_answers(answers: Sequence[SlurmAnswer], asked_for: str) -> None:
    """Print a table of the answers, what they do not say, and a remedy for each refusal.

    asked_for: what the requests are those of
    """
    table = Table(title="What Slurm says to each request", title_justify="left")
    for column in ("jobs", "partition", "account", "nodes", "minutes", "accepted", "Slurm's answer"):
        table.add_column(column, overflow="fold")
    for answer in answers:
        request = answer.request
        asked = (request.partition or "-", request.account or "-", str(request.nodes), str(request.minutes))
        line = (answer.jobs, *asked, "yes" if answer.is_accepted else "NO", answer.text)
        table.add_row(*(Text(printable(cell)) for cell in line))
    console = Console(width=120)
    console.print(f"Slurm was asked for {asked_for}; no job was submitted (sbatch --test-only).", markup=False)
    console.print(table)
    if note := _note_on_accounts([answer for answer in answers if answer.is_accepted]):
        console.print(note, markup=False)
    for answer in answers:
        if not answer.is_accepted:
            console.print(f"{answer.jobs}: {answer.remedy}", markup=False)


def _note_on_accounts(accepted: Sequence[SlurmAnswer]) -> str:
    """Return what Slurm's answers do not say about accounts; empty where no job names one."""
    accounts = ", ".join(sorted({answer.request.account for answer in accepted if answer.request.account}))
    without = [answer.jobs for answer in accepted if not answer.request.account]
    if accounts and not accounts_are_checked():
        return (
            f"not checked: account {accounts}. This Slurm accepts any account (AccountingStorageEnforce in `scontrol show "
            "config`)."
        )
    if accounts and without:
        return (
            f"without an account: {', '.join(without)}. Slurm charges your default account for them, and other jobs name "
            f"{accounts}; set account in each partition, or in none."
        )
    return ""
