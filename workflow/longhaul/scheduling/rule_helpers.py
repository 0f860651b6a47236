"""What the Snakemake files need from the package beside the plan: which config was named, and what a rule's triggers are."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from snakemake.cli import args_to_api
from snakemake.io import flag, is_flagged
from snakemake.persistence import PersistenceBase
from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

from longhaul.artifacts.files import content_hash
from longhaul.artifacts.schemas import Lock
from longhaul.config.load import load_config
from longhaul.config.site_config import Site
from longhaul.errors import UserError
from longhaul.jobs.builders import payload
from longhaul.jobs.launch_files import rendered_run
from longhaul.planning import Plan, lock_path, make_plan
from longhaul.planning.slurm_request import RESOURCE_KEYS
from longhaul.scheduling.disk_space import require_free_space

__all__ = [
    "RESOURCE_KEYS",
    "ignore_order_only_inputs",
    "load_run_plan",
    "or_exit",
    "order_only",
    "plan_key",
    "source_key",
    "spec_key",
]

T = TypeVar("T")

# Parts of a payload that say where and how fast, not what: a change re-runs nothing that is finished.
_NOT_RESULTS = {
    "workers",
    "survey",
    "scratch",
    "config_hash",
    "folder",
    "out",
    "files",
    "train_files",
    "path",
    "model_vocab_size",
}


def load_run_plan(workflow: Any) -> tuple[Path, Plan]:
    """(config file, plan) of a Snakemake run; a UserError is printed and ends the parse with exit code 2."""
    return or_exit(_load_run_plan, workflow)


def or_exit(function: Callable[..., T], *arguments: Any) -> T:
    """The function's result; a UserError is printed and ends this process with exit code 2."""
    try:
        return function(*arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(UserError.exit_code)


def _load_run_plan(workflow: Any) -> tuple[Path, Plan]:
    config = _config_file(workflow)
    _check_deployment(workflow)
    existing = _check_results_folder(Path("results"))
    if workflow.is_main_process:
        require_free_space(existing)
    loaded = load_config(config)
    if workflow.is_main_process:
        _check_executor(loaded.site)
    lock = lock_path(loaded.config.run)
    plan = make_plan(loaded, Lock.read(lock) if lock.exists() else None)
    if workflow.is_main_process:
        rendered_run(plan, Path.cwd())  # what cannot be written into a launch script is refused in a dry run too
    return config, plan


def _check_deployment(workflow: Any) -> None:
    """Snakemake would enter an environment around launch.sh, which then enters the site's own."""
    if methods := workflow.deployment_settings.deployment_method:
        names = ", ".join(sorted(str(method) for method in methods))
        raise UserError(
            f"--software-deployment-method is {names}", "the site file's `software` says it: drop the option"
        )


def _check_executor(site: Site) -> None:
    """Jobs of a Slurm site ask for what only Slurm gives, and those of this machine would go to no partition."""
    executor = _executor()
    if executor is None:
        return
    plugin: Any = ExecutorPluginRegistry().get_plugin(executor)
    is_local = plugin.common_settings.local_exec
    if site.scheduler == "slurm" and is_local:
        raise UserError(
            f"site {site.name} has scheduler: slurm, but Snakemake's executor is {executor}: jobs would start here",
            "use --profile profiles/slurm, or name a site of this machine in the config: `site: local`",
        )
    if site.scheduler == "local" and not is_local:
        raise UserError(
            f"site {site.name} has scheduler: local, but Snakemake's executor is {executor}",
            "use --profile profiles/local, or name your centre's site file in the config: `site: my-centre.yaml`",
        )


def _executor() -> str | None:
    """What --executor or a profile named; None where Snakemake was not started by its command line.

    Rules are read before Snakemake tells its workflow of an executor, and a dry run never does. Its command line cannot be
    parsed again: a relative --profile was meant from the folder before --directory. So this looks where Snakemake has it.
    """
    frame = inspect.currentframe()
    while frame and frame.f_code is not args_to_api.__code__:
        frame = frame.f_back
    return frame.f_locals["args"].executor if frame else None


def _check_results_folder(folder: Path) -> Path:
    """Snakemake looks into it before anything of ours runs, and would end in a traceback. Returns it, or where it will be."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder.absolute()} is not a folder", "move it away, or run with another --directory")
    existing = folder if folder.exists() else Path.cwd()
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {existing.absolute()}", "name a folder of your own with --directory")
    return existing


def _config_file(workflow: Any) -> Path:
    """Exactly one config: Snakemake would merge several, and --config would change one that no file records."""
    named = [Path(path) for path in workflow.overwrite_configfiles]
    if len(named) > 1:
        raise UserError(f"--configfile names {len(named)} files", "name one: a run is described by exactly one file")
    if workflow.config_settings.config:
        keys = ", ".join(workflow.config_settings.config)
        raise UserError(
            f"--config sets {keys}", "write it into the config file: a run is described by exactly one file"
        )
    return (named[0] if named else Path(workflow.basedir) / "config" / "config.yaml").absolute()


_ORDER_ONLY = "order_only"


def order_only(paths: list[str]) -> list[Any]:
    """Inputs that are to be there before a job starts, as make calls them: which ones, and how many, is no cause to run it."""
    return [flag(path, _ORDER_ONLY) for path in paths]


def ignore_order_only_inputs() -> None:
    """Snakemake runs a job again when its set of inputs is another one, and knows no exception. Patches what it compares."""
    compared: Any = PersistenceBase._input
    if hasattr(compared, "unpatched"):
        return

    def without_order_only(persistence: Any, job: Any) -> list[str]:
        passed_over = {str(path) for path in job.input if is_flagged(path, _ORDER_ONLY)}
        return [path for path in compared(persistence, job) if path not in passed_over]

    without_order_only.unpatched = compared  # pyright: ignore[reportFunctionMemberAccess]
    PersistenceBase._input = without_order_only  # pyright: ignore[reportAttributeAccessIssue]


def spec_key(plan: Plan, job: str) -> str:
    """A hash of what a job's result depends on beside its inputs; Snakemake re-runs the job when it changes."""
    verb, _, name = job.partition("-")
    if verb == "train":
        return content_hash(plan.stage(name).spec)
    told = payload(Plan(plan.loaded, None, plan.stages), job).model_dump(mode="json")
    return content_hash({key: value for key, value in told.items() if key not in _NOT_RESULTS})


def plan_key(plan: Plan) -> str:
    """A hash of what the plan's JSON shows."""
    return content_hash([plan.config.model_dump(mode="json"), plan.site.model_dump(mode="json")])


def source_key(plan: Plan) -> str:
    """A hash of everything that fetch reads."""
    config = plan.config
    fetched = {n: d.model_dump(mode="json") for n, d in config.datasets.items() if d.hub or d.python_stdlib}
    return content_hash(
        [
            fetched,
            config.tokenizer.model_dump(mode="json"),
            config.model.pretrained and config.model.pretrained.model_dump(mode="json"),
        ]
    )
