"""Registers the verbs `longhaul site detect`, `check` and `nodes` with their options; other modules do the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longhaul.errors import UserError

app = typer.Typer(help="Describe a computing centre, and check the description.", no_args_is_help=True)

ProbeOption = Annotated[
    bool, typer.Option("--probe", help="Submit a short job per partition. It reads the hardware of a node.")
]
WaitOption = Annotated[
    float, typer.Option(min=0.1, help="With `--probe`: cancel jobs that have not ended after this number of minutes.")
]


@app.command()
def detect(
    out: Annotated[Path, typer.Option(help="The site file to write; an existing file is refused.")] = Path(
        "my-centre.yaml"
    ),
    probe: ProbeOption = False,
    wait_minutes: WaitOption = 30.0,
) -> None:
    """Write a first site file from what Slurm shows on this login node. Comments in it name what Slurm does not know.

    With `--probe`, one-minute jobs read the memory of GPUs, their driver and the networks of compute nodes.

    Example: `longhaul site detect --out my-centre.yaml`
    """
    from longhaul.artifacts.atomic_files import writable_file, write_text
    from longhaul.config.load_config import load_site
    from longhaul.scheduling.detect_site import detect_site

    if out.exists():
        raise UserError(f"{out} exists already", "name another file with --out, or move it away")
    write_text(writable_file(out), detect_site(out.stem, wait_minutes if probe else None))
    load_site(str(out.absolute()), Path())
    print(f"wrote {out}. Next: compare it with your centre's guide, then longhaul site check {out}")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="CONFIG|SITE", help="A run's YAML file, or a site file.")],
    probe: ProbeOption = False,
    wait_minutes: WaitOption = 30.0,
) -> None:
    """Ask Slurm whether it accepts each kind of job (`sbatch --test-only`), of a run or of a site file alone.

    Also compares the time and nodes of the jobs with the limits that Slurm shows: sbatch may accept a job that never
    starts.

    Submits nothing without `--probe`. With it, a two-minute job per partition reads the hardware of a node, and a table
    compares that with the site file.

    Exit code 1: a request is refused, or a limit or a node differs from the site file.

    Example: `longhaul site check my-centre.yaml --probe`
    """
    from longhaul.config.load_config import is_site_file, load_site
    from longhaul.planning.load_plan import load_plan
    from longhaul.scheduling.check_site import CONTROLLER, check_run, check_site, print_answers
    from longhaul.scheduling.compare_nodes_with_site import compare_nodes, print_comparisons, probe_requests
    from longhaul.scheduling.compare_with_slurm_limits import compare_limits
    from longhaul.scheduling.find_software import compare_software
    from longhaul.scheduling.probe_nodes import probe_nodes

    if is_site_file(file):
        site = load_site(str(file.absolute()), Path())
        answers, requests = check_site(site), None
        asked_for = f"each kind of job on up to 2 nodes of site {site.name}, and for its largest training"
    else:
        plan = load_plan(file)
        site, answers = plan.site, check_run(plan)
        requests = [answer.request for answer in answers if answer.jobs != CONTROLLER]
        asked_for = f"each job of run {plan.run}"
    print_answers(answers, asked_for)
    lines = [*compare_limits(site, requests), *compare_software(site)]
    if lines:
        written = "site file" if requests is None else "jobs ask for"
        print_comparisons("Limits of partitions, QOS and account; software", lines, written)
    if probe:
        found = compare_nodes(site, probe_nodes(probe_requests(site), wait_minutes))
        print_comparisons("What the nodes have", found)
        lines += found
    if not all(answer.is_accepted for answer in answers) or any(line.problem for line in lines):
        raise SystemExit(1)


@app.command()
def nodes(
    site: Annotated[str, typer.Argument(metavar="SITE", help="A site in config/sites, or the path of a site file.")],
    sequence_length: Annotated[int, typer.Option(min=8, max=10**8, help="Tokens per sample.")] = 4096,
) -> None:
    """Print how many nodes of a site well-known models need, from 1.5 to 671 billion parameters, by the memory plan.

    `longhaul plan CONFIG` prints the same for the model of a run.

    Example: `longhaul site nodes leonardo`
    """
    from longhaul.config.load_config import load_site
    from longhaul.report.needed_nodes_table import reference_nodes_text

    print(reference_nodes_text(load_site(site, Path()), sequence_length))
