"""longhaul <verb>: one verb per rule, and a few for people. Heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longhaul.errors import UserError

if TYPE_CHECKING:
    from longhaul.jobs.specs import Job

# Jobs run where there is no internet; only fetch and doctor-like verbs may look outside.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one verb; a UserError is printed without a traceback and ends with exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        raise SystemExit(1) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longhaul", description=__doc__)
    verbs = parser.add_subparsers(metavar="verb", required=True)
    for verb, (run, text) in _FOR_PEOPLE.items():
        added = verbs.add_parser(verb, help=text)
        added.add_argument("config", type=Path, nargs="?", default=Path("config/config.yaml"))
        added.set_defaults(run=run)
    verbs.choices["plan"].add_argument("--out", type=Path, help="write it as JSON instead of printing it")
    verbs.choices["fetch"].add_argument("--out", type=Path, help="lock file; default results/<run>.lock.json")
    run = verbs.add_parser("run", help="read a config, then start Snakemake with it")
    run.add_argument("config", type=Path)
    run.add_argument("options", nargs=argparse.REMAINDER, help="Snakemake's own, e.g. -n --profile profiles/slurm")
    run.set_defaults(run=_run)
    for verb, text in _JOBS.items():
        added = verbs.add_parser(verb, help=text)
        added.add_argument("job", type=Path, help="the rendered job file")
        added.set_defaults(run=_run_job, verb=verb)
    supervise = verbs.add_parser("supervise", help="run a job's steps, restart them, queue the job again")
    supervise.add_argument("job", type=Path, help="the rendered launch.json")
    supervise.set_defaults(run=_supervise)
    retry = verbs.add_parser("retry", help="forget why a job failed, so that the next run tries it again")
    retry.add_argument("folder", type=Path, help="results/<run>/stages/<stage>, or results/<run>/jobs/<job>")
    retry.set_defaults(run=_retry)
    report = verbs.add_parser("report", help="write one self-contained HTML page about a run")
    report.add_argument("folder", type=Path, help="results/<run>")
    report.add_argument("out", type=Path)
    report.set_defaults(run=_report)
    _add_data_verbs(verbs.add_parser("data", help="look into token shards"))
    return parser


def _add_data_verbs(data: argparse.ArgumentParser) -> None:
    inspect = data.add_subparsers(metavar="verb", required=True).add_parser("inspect", help="print documents and masks")
    inspect.add_argument("manifest", type=Path, help="results/<run>/data/<dataset>.json")
    inspect.add_argument("--split", default="train")
    inspect.add_argument("--first", type=int, default=0, help="number of the first document")
    inspect.add_argument("--count", type=int, default=3, help="how many documents")
    inspect.add_argument("--tokenizer", type=Path, help="its tokenizer.json, default: that of the run")
    inspect.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    from longhaul.data.shards.inspect_documents import run

    run(options.manifest, options.split, options.first, options.count, options.tokenizer)


def _plan(options: argparse.Namespace) -> None:
    from longhaul.artifacts.files import write_json
    from longhaul.report.plan_table import plan_json, print_plan

    plan = _load_plan(options.config)
    if options.out:
        write_json(options.out, plan_json(plan))
    else:
        print_plan(plan)


def _run(options: argparse.Namespace) -> None:
    """Snakemake reads --configfile before any rule, and ends in a traceback where that is no readable YAML file."""
    from longhaul.config.load import load_config
    from longhaul.jobs.launch_files import REPOSITORY

    if named := [word for word in options.options if word.startswith("--configfile")]:
        raise UserError(f"{named[0]} names a second config", f"drop it: {options.config} is the run's one file")
    load_config(options.config)
    # --configfile takes every word up to the next option: ahead of those of the user, which may begin with a target.
    words = ["--configfile", str(options.config.absolute()), "--snakefile", str(REPOSITORY / "Snakefile")]
    os.execv(sys.executable, [sys.executable, "-m", "snakemake", *words, *options.options])


def _fetch(options: argparse.Namespace) -> None:
    from longhaul.config.load import load_config
    from longhaul.fetch.hub_downloads import fetch
    from longhaul.planning import lock_path, make_plan

    loaded = load_config(options.config)
    waiting = make_plan(loaded).waiting
    lock = fetch(loaded, Path("results") / loaded.config.run / "fetched")
    make_plan(loaded, lock)
    lock.write(options.out or lock_path(loaded.config.run))
    for check in waiting:
        print(f"checked now: {check}")


def _render(options: argparse.Namespace) -> None:
    from longhaul.jobs.launch_files import render_run

    render_run(_load_plan(options.config), Path.cwd())


def _verify(options: argparse.Namespace) -> None:
    from longhaul.checks.verify_run import print_verdicts, verify
    from longhaul.jobs.builders import payload
    from longhaul.jobs.specs import TrainSpec

    plan = _load_plan(options.config)
    jobs = [payload(plan, f"train-{stage.name}") for stage in plan.stages]
    roots = {job.stage.name: Path(job.weights_root) for job in jobs if isinstance(job, TrainSpec)}
    verdicts = verify(plan, roots, Path("results") / plan.run)
    print_verdicts(verdicts)
    if any(verdict.damage for verdict in verdicts):
        raise SystemExit(1)


def _load_plan(config: Path):
    from longhaul.artifacts.schemas import Lock
    from longhaul.config.load import load_config
    from longhaul.planning import lock_path, make_plan

    loaded = load_config(config)
    lock = lock_path(loaded.config.run)
    return make_plan(loaded, Lock.read(lock) if lock.exists() else None)


def _report(options: argparse.Namespace) -> None:
    from longhaul.report.html_page import run

    run(options.folder, options.out)


def _supervise(options: argparse.Namespace) -> None:
    from longhaul.jobs.specs import LaunchSpec
    from longhaul.scheduling.supervisor import run

    run(LaunchSpec.read(options.job))


def _retry(options: argparse.Namespace) -> None:
    from longhaul.artifacts.job_state import read_failure

    failure = read_failure(options.folder)
    if failure is None:
        raise UserError(f"{options.folder} holds no failure.json", "name a failed job's folder, as its log does")
    (options.folder / "failure.json").unlink()
    print(f"forgotten: {failure.cause}")


def _run_job(options: argparse.Namespace) -> None:
    """A failure is written down beside the job file for the supervisor, as its exit code may not arrive."""
    os.environ.update(_OFFLINE)
    try:
        with _lean_imports():
            run, kind = _job(options.verb)
        run(kind.read(options.job))
    except Exception as error:
        from longhaul.runtime.failure_reports import report_failure
        from longhaul.runtime.rank import this_rank

        if (options.job.parent / "launch.json").exists():
            report_failure(options.job.parent, error, this_rank())
        raise


@contextmanager
def _lean_imports() -> Iterator[None]:
    """What a process imports is most of what it costs to start one, and a training starts thousands.

    Modules are half a million objects and no garbage: looking for some again and again while they are made takes a fifth of
    that time, and each full collection of the training would look through them once more. And DeepSpeed's autotuner, which
    nothing here uses, imports MLflow where it is installed; trackers import it on rank 0 where a config asks for it.
    """
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if hidden:
            del sys.modules["mlflow"]


def _job(verb: str) -> tuple[Callable[[Any], None], type[Job]]:
    """What runs a job, and what it is told by."""
    from longhaul.jobs import specs as jobs

    match verb:
        case "environment":
            from longhaul.checks.environment import run

            kind = jobs.EnvironmentSpec
        case "fabric":
            from longhaul.checks.fabric import run

            kind = jobs.FabricSpec
        case "tokenizer":
            from longhaul.data.tokenizers.build_tokenizer import run

            kind = jobs.TokenizerSpec
        case "survey":
            from longhaul.data.shards.tokenize_dataset import survey as run

            kind = jobs.TokenizeSpec
        case "encode":
            from longhaul.data.shards.tokenize_dataset import encode as run

            kind = jobs.EncodeSpec
        case "tokenize":
            from longhaul.data.shards.tokenize_dataset import run

            kind = jobs.TokenizeSpec
        case "train":
            from longhaul.train.loop import run

            kind = jobs.TrainSpec
        case _:
            from longhaul.export.export_checkpoint import run

            kind = jobs.ExportSpec
    return run, kind


_FOR_PEOPLE = {
    "plan": (_plan, "print what a config will do: batches, memory, GPU-hours, Slurm requests"),
    "fetch": (_fetch, "download what the config names on the hub, and pin it"),
    "render": (_render, "write every job's launch.sh, job.sbatch and DeepSpeed config below results/<run>"),
    "verify": (_verify, "read every file of a run's data, checkpoints and exports, and name those that are damaged"),
}
_JOBS = {
    "environment": "check the nodes",
    "fabric": "measure the network between the ranks",
    "tokenizer": "load or train the tokenizer",
    "survey": "hash a dataset's files and choose its encoder, for jobs that share its units",
    "encode": "make a share of a dataset's units",
    "tokenize": "turn a dataset into token shards",
    "train": "train one stage",
    "convert": "export a checkpoint as a Hugging Face folder, and prove it",
}
