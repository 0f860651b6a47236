"""Defines the command `longhaul`: the verbs and options that people type. Groups of verbs (site, fabric, job) have modules in
scheduling/.

A verb imports what it needs when it runs, so that `longhaul --help` and the start of a job stay fast.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longhaul import __version__
from longhaul.errors import UserError
from longhaul.scheduling import fabric_verbs, job_verbs, site_verbs, tune_verb

if TYPE_CHECKING:
    from longhaul.planning import Plan

app = typer.Typer(
    name="longhaul",
    help="From raw text to a verified Hugging Face model, on a laptop or over many nodes of a Slurm cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
data_app = typer.Typer(help="Look into token shards.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(site_verbs.app, name="site")
app.add_typer(fabric_verbs.app, name="fabric")
app.add_typer(job_verbs.app, name="job", hidden=True)
app.command()(tune_verb.tune)

RunArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CONFIG|RUN]",
        help="The run's YAML file, or its folder `results/<run>`; default: the run in `results/` that changed last.",
    ),
]
ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The run's YAML file, or `demo` for the demo that longhaul ships.")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb. A UserError is printed without a traceback and ends the process with exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Under LC_ALL=C, an escape stands for a letter that is not ASCII.
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=list(arguments) if arguments is not None else None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        raise SystemExit(1) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"longhaul {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def plan(
    config: ConfigArgument,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the plan as JSON to this file instead of printing it.")
    ] = None,
    test_only: Annotated[
        bool, typer.Option("--test-only", help="Ask Slurm about each request, as `longhaul site check` does.")
    ] = False,
) -> None:
    """Print what a config will do: batches, memory per GPU, GPU-hours, Slurm requests, changes. Starts nothing.

    Exit code 1: with `--test-only`, Slurm refuses a request.

    Example: `longhaul plan mine.yaml`
    """
    from longhaul.artifacts.atomic_files import writable_file, write_json
    from longhaul.data.check_first_rows import check_inputs
    from longhaul.report.plan_json import plan_json
    from longhaul.report.plan_table import print_plan
    from longhaul.report.planned_changes import change_lines, removed_stages, stage_changes
    from longhaul.scheduling.check_site import check_run, print_answers

    made = _load_plan(config)
    check_inputs(made)
    answers = check_run(made) if test_only else []
    if out:
        write_json(writable_file(out), plan_json(made))
    else:
        changes = stage_changes(made)
        print_plan(made)
        print("\n".join(change_lines(changes, removed=removed_stages(made))))
    if answers:
        print_answers(answers, f"each job of run {made.run}")
    if not all(answer.is_accepted for answer in answers):
        raise SystemExit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context, config: ConfigArgument) -> None:
    """Run the whole workflow, or resume it: the same command again continues after any failure.

    Checks the config, then starts Snakemake with the profile that fits the site's scheduler. All other options go to
    Snakemake: `-n` for a dry run, `--profile` for a profile of your own, `--directory` for another working folder.

    Example: `longhaul run mine.yaml -n`
    """
    from longhaul.scheduling.run_verb import start_snakemake

    start_snakemake(_config_path(config), context.args)


@app.command()
def fetch(
    config: ConfigArgument,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="sources|STAGE/TASK",
            help="sources: all except the data of evaluation tasks. STAGE/TASK: only the data of this task.",
        ),
    ] = None,
) -> None:
    """Download what the config and its evaluation tasks need from the hub, and pin the revisions. Needs internet access.

    Example: `longhaul fetch mine.yaml`
    """
    from longhaul.config.load_config import load_config
    from longhaul.data.check_task_templates import check_task_templates
    from longhaul.fetch.hub_downloads import pin_sources
    from longhaul.fetch.task_data import pin_task_data
    from longhaul.planning.evaluation_tasks import tasks_to_fetch

    loaded = load_config(_config_path(config))
    tasks = {
        f"{stage.name}/{task}": (stage.name, task)
        for stage in loaded.config.stages
        for task in tasks_to_fetch(loaded, stage)
    }
    if only not in (None, "sources", *tasks):
        raise UserError(
            f"--only {only}: nothing of this name is fetched", f"use one of {', '.join(['sources', *tasks])}"
        )
    if only in (None, "sources"):
        pin_sources(loaded)
        check_task_templates(loaded)  # also of tasks whose data were made just now
    for name in tasks if only is None else [only] if only in tasks else []:
        pin_task_data(loaded, *tasks[name])


@app.command()
def status(
    run: RunArgument = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every 30 seconds, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False,
) -> None:
    """Show how a run stands: steps, losses, speed, time left, jobs in Slurm's queue and why they wait, failures.

    Works during the run, on any host that sees its folder, and after it.

    Example: `longhaul status mine.yaml --watch`
    """
    from longhaul.scheduling.show_status import print_json, print_status, run_paths

    if watch and as_json:
        raise UserError("--watch repeats the text for people, and --json prints once", "use one of them")
    paths = run_paths(run)
    if as_json:
        print_json(paths)
    else:
        print_status(paths, watch)


@app.command()
def doctor(
    run: RunArgument = None,
) -> None:
    """Say why a run fails or waits: cause, evidence and remedy, from its records, its logs and Slurm's queue.

    Example: `longhaul doctor mine.yaml`
    """
    from longhaul.scheduling.show_status import print_diagnosis, run_paths

    print_diagnosis(run_paths(run))


@app.command()
def serve(
    config: ConfigArgument,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="Name of the stage that exported the model.")],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", "-n", help="Print memory, Slurm request and the engine's commands. Start nothing."),
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the server of this stage.")] = False,
) -> None:
    """Serve a stage's export with an OpenAI-compatible API: as a Slurm job, or on this machine until Ctrl-C.

    Example: `longhaul serve mine.yaml chat`
    """
    from longhaul.scheduling import serve_verb

    act = serve_verb.stop if stop else serve_verb.show if dry_run else serve_verb.serve
    act(_load_plan(config), stage)


@app.command()
def report(
    run: RunArgument = None,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="The HTML file; default: report.html in the run's folder.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run, also while it runs.

    Example: `longhaul report mine.yaml`
    """
    from longhaul.report.html_page import write_report
    from longhaul.scheduling.read_job_queue import queue_asker
    from longhaul.scheduling.show_status import run_paths

    paths = run_paths(run)
    page = out or paths.report
    write_report(paths.folder, page, queue_asker(paths))
    print(f"wrote {page}")


@app.command()
def verify(config: ConfigArgument) -> None:
    """Read every file of a run's tokenizer, data, packs, checkpoints and exports, and name those that are damaged.

    Also reads rows that fetch streamed from the Hub, and the data of evaluation tasks.

    Exit code 1: a file is damaged.

    Example: `longhaul verify mine.yaml`
    """
    from longhaul.checks.verify_stored_files import print_results, verify_stored_files

    results = verify_stored_files(_load_plan(config))
    print_results(results)
    if any(result.damage for result in results):
        raise SystemExit(1)


@app.command()
def baseline(config: ConfigArgument) -> None:
    """Store the rates that a run's environment check and fabric check measured, as the usual rates of the site.

    Writes `<site file>.baseline.json` beside the site file. Later checks compare with it.

    Example: `longhaul baseline mine.yaml`
    """
    from longhaul.artifacts.atomic_files import writable_file
    from longhaul.artifacts.site_baseline import baseline_path
    from longhaul.checks.learn_baseline import learn_baseline, print_baseline

    made = _load_plan(config)
    learned, path = learn_baseline(made), baseline_path(made.loaded.site_path)
    learned.write(writable_file(path))
    print_baseline(learned)
    print(f"wrote {path}; later checks compare with it")


@app.command()
def prune(
    config: ConfigArgument,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the listed files.")] = False,
) -> None:
    """List old weights, exports and logs of a run with their sizes; with --delete, remove them.

    Weights and exports are old if neither the config nor the run's finished stages and exports refer to them. Logs are
    old if the job has five later attempts.

    Example: `longhaul prune mine.yaml`
    """
    from longhaul.scheduling.prune_results import prune as prune_results

    prune_results(_load_plan(config), delete)


@app.command()
def nodes(
    release: Annotated[
        list[str] | None,
        typer.Option("--release", metavar="NODE", help="Remove a repaired node from the quarantine; may be repeated."),
    ] = None,
) -> None:
    """List the nodes of all runs in this folder: quarantined, unfit, flaky or fit, by what checks found over time.

    Example: `longhaul nodes --release n3`
    """
    from longhaul.artifacts.paths import QUARANTINE
    from longhaul.artifacts.quarantine import release_from_quarantine
    from longhaul.report.node_history import print_nodes

    if release:
        release_from_quarantine(QUARANTINE, release)
        print(f"removed from {QUARANTINE}, so that later jobs may use them: {', '.join(release)}")
        return
    print_nodes(Path())


@app.command()
def retry(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="The failed job's folder: `results/<run>/stages/<stage>` or `results/<run>/jobs/<job>`.",
        ),
    ],
) -> None:
    """Delete the record of a job's failure, so that the next run tries the job again.

    Example: `longhaul retry results/my-run/stages/pretrain`
    """
    from longhaul.artifacts.job_state import read_failure
    from longhaul.artifacts.paths import JobFolder

    failure = read_failure(folder)
    if failure is None:
        raise UserError(f"{folder} holds no failure.json", "name the folder of a failed job, as its log does")
    JobFolder(folder).failure.unlink()
    print(f"deleted the record of this failure: {failure.cause}")


@data_app.command()
def inspect(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="A dataset's manifest: `results/<run>/data/<dataset>.json`.")
    ],
    split: Annotated[str, typer.Option(help="`train` or `validation`.")] = "train",
    first: Annotated[int, typer.Option(help="Number of the first document.")] = 0,
    count: Annotated[int, typer.Option(help="Number of documents to print.")] = 3,
    tokenizer: Annotated[
        Path | None, typer.Option(dir_okay=False, help="A tokenizer.json; default: the run's.")
    ] = None,
) -> None:
    """Print documents of a dataset; tokens that count in the loss are coloured.

    Example: `longhaul data inspect results/demo/data/docstrings.json --count 1`
    """
    from longhaul.data.shards.inspect_documents import run as print_documents

    print_documents(manifest, split, first, count, tokenizer)


@app.command()
def init(
    example: Annotated[str | None, typer.Option(help="A config in config/examples; default: longhaul asks.")] = None,
    site: Annotated[
        str | None, typer.Option(help="A site in config/sites, or the path of a site file; default: longhaul asks.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Name of the run; default: longhaul asks.")] = None,
) -> None:
    """Copy an example config and a site file into the current folder, as the start of a run of your own.

    Example: `longhaul init --example llama-8b-pretrain --site slurm-generic --run mine`
    """
    from longhaul.config import init_files
    from longhaul.config.load_config import SITES

    examples, sites = (", ".join(init_files.names_in(folder)) for folder in (init_files.EXAMPLES, SITES))
    chosen_example = _given_or_asked(example, f"Which example? ({examples})", init_files.check_example)
    question = f"Which site? ({sites}, or the path of a site file)"
    chosen_site = _given_or_asked(site, question, lambda written: init_files.check_site(written, Path()))
    name = _given_or_asked(run, "Name of the run", init_files.check_run, default="mine")
    config, site_file = init_files.copy_start_files(chosen_example, chosen_site, name, Path())
    print(f"wrote {config}, with the site {site_file}. Next: adapt both, then longhaul plan {config}")


def _given_or_asked(given: str | None, question: str, check: Callable[[str], None], default: str | None = None) -> str:
    """Return a given value, or the user's first answer that passes the check.

    Raises:
        UserError: the given value does not pass.
    """
    if given is not None:
        check(given)
        return given

    def checked(answer: str) -> str:
        try:
            check(answer)
        except UserError as error:
            raise typer.BadParameter(str(error)) from None  # typer prints it and asks again
        return answer

    return typer.prompt(question, default=default, value_proc=checked)


def _load_plan(config: Path) -> Plan:
    from longhaul.planning.load_plan import load_plan

    return load_plan(config)


def _config_path(config: Path) -> Path:
    from longhaul.planning.load_plan import config_path

    return config_path(config)
