"""Functions that the Snakefile calls: load the plan, take the run's lease, resources of rules; what happens at start and end."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.artifacts.atomic_files import canonical_json, content_hash, read_json, write_json
from longhaul.artifacts.job_state import JobsToRun, current_invocation, read_state
from longhaul.artifacts.leases import RunLease
from longhaul.artifacts.paths import RESULTS, JobId, RunPaths, job_of
from longhaul.compat import slurm_plugin, snakemake
from longhaul.config.load_config import load_config
from longhaul.config.shipped_files import data_root
from longhaul.config.site_config import Site
from longhaul.data.check_first_rows import check_inputs
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_kinds, job_request, job_rerun_key
from longhaul.jobs.launch_files import render_run, write_launch_files
from longhaul.planning import Plan, build_plan
from longhaul.planning.check_inference_servers import starts_engine
from longhaul.planning.evaluation_tasks import own_task
from longhaul.planning.scale_test_sizes import scale_ladder
from longhaul.planning.slurm_request import RESOURCE_KEYS
from longhaul.report.plan_json import plan_json, planned_jobs
from longhaul.report.planned_changes import AGAIN, KEPT, TRAINS, change_lines, removed_stages, stage_changes
from longhaul.scheduling import check_disk_space as disk_space
from longhaul.scheduling import retry_policy, slurm_client
from longhaul.scheduling.cancelled_jobs import record_cancelled_wait
from longhaul.scheduling.end_local_jobs import LocalJobs
from longhaul.scheduling.report_failed_run import report_failed_run
from longhaul.scheduling.request_at_submission import require_enough_nodes, submitted_request
from longhaul.scheduling.retry_policy import SnakemakeJob
from longhaul.scheduling.sbatch_refusals import record_refusal, warner_of_waiting_jobs
from longhaul.scheduling.snakemake_main import is_main_program
from longhaul.serving.engine_version import check_packages_here

if TYPE_CHECKING:
    from longhaul.scheduling.run_display import RunDisplay

T = TypeVar("T")

# Snakemake evaluates a job's resources one key after the other; state files and the quarantine are read once for all.
ALL_CORES = 1_000_000
"""Threads of a job that runs alone: Snakemake takes those that it has (--cores), which may be more than the machine has."""
_REQUEST_VALID_S = 1.0


def load_run_plan(workflow: Any) -> tuple[Path, Plan]:
    """Return the config file and the plan of a Snakemake run.

    A UserError is printed and ends the process with exit code 2, as Snakemake would print a traceback.
    """
    return _or_exit(_load_run_plan, workflow)


def _or_exit(function: Callable[..., T], *arguments: Any) -> T:
    try:
        return function(*arguments)
    except UserError as error:
        _exit(error)


def _exit(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(UserError.exit_code)  # 2 for every error: no job has started


def _load_run_plan(workflow: Any) -> tuple[Path, Plan]:
    config = _config_file(workflow)
    _refuse_software_deployment(workflow)
    existing = _check_results_folder(RESULTS)
    if workflow.is_main_process:
        disk_space.require_free_space(existing)
        _refuse_fewer_rerun_triggers(snakemake.rerun_triggers())
    loaded = load_config(config)
    if workflow.is_main_process:
        _check_executor(loaded.site)
    lock = RunPaths(loaded.config.run).lock
    plan = build_plan(loaded, Lock.read(lock) if lock.exists() else None)
    if workflow.is_main_process:
        check_inputs(plan)
        render_run(plan, Path.cwd())  # refuses in a dry run, too, what a launch script cannot contain
        _print_changes_and_warnings(plan)
    return config, plan


def _print_changes_and_warnings(plan: Plan) -> None:
    """Print what the run will do to stages that have trained, unless it keeps all of them; and warnings of the other stages.

    Raises:
        UserError: the weights of a stage cannot continue under the planned number of steps.
    """
    changes = stage_changes(plan)
    if any(change.action != KEPT for change in changes) and not _has_own_dry_run():
        for line in change_lines(changes, removed=removed_stages(plan)):
            print(line, file=sys.stderr, flush=True)
    kept = {change.stage for change in changes if change.action == KEPT}
    for warning in (text for stage in plan.stages if stage.name not in kept for text in stage.warnings):
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _config_file(workflow: Any) -> Path:
    """Return the run's one config file: that of --configfile or of a module user's `configfile:`, else the demo's.

    Snakemake would merge several files, and --config would change a value that no file records.
    """
    named = list(dict.fromkeys(Path(path).absolute() for path in workflow.configfiles))
    if len(named) > 1:
        files = ", ".join(map(str, named))
        raise UserError(f"{len(named)} config files are named: {files}", "name one: exactly one file describes a run")
    if workflow.config_settings.config:
        keys = ", ".join(workflow.config_settings.config)
        raise UserError(f"--config sets {keys}", "write it into the config file: exactly one file describes a run")
    return named[0] if named else data_root() / "config" / "config.yaml"


def _refuse_software_deployment(workflow: Any) -> None:
    """Refuse --software-deployment-method: Snakemake would enter an environment before launch.sh enters the site's."""
    if methods := workflow.deployment_settings.deployment_method:
        names = ", ".join(sorted(str(method) for method in methods))
        raise UserError(
            f"--software-deployment-method is {names}",
            "drop the option: the site file's `software` names the environment of the jobs",
        )


def _refuse_fewer_rerun_triggers(named: set[str] | None) -> None:
    """Refuse --rerun-triggers without one of the profiles' triggers: a changed config would leave old results as they are."""
    missing = [name for name in ("params", "mtime", "input") if named is not None and name not in named]
    if missing:
        raise UserError(
            f"--rerun-triggers lacks {', '.join(missing)}: what a changed config or input asks for would not be made",
            "drop the option: the profiles set params, mtime and input",
        )


def _check_executor(site: Site) -> None:
    """Refuse an executor that does not fit the site: Slurm's jobs would start here, or local ones go to no partition."""
    executor = snakemake.executor_name()
    if executor is None:
        return
    plugin: Any = ExecutorPluginRegistry().get_plugin(executor)
    is_local = plugin.common_settings.local_exec
    if site.scheduler == "slurm" and is_local:
        raise UserError(
            f"site {site.name} has scheduler: slurm, but Snakemake's executor is {executor}: jobs would start here",
            f"use --profile {_profile(site)}, or name a site of this machine in the config: `site: local`",
        )
    if site.scheduler == "local" and not is_local:
        raise UserError(
            f"site {site.name} has scheduler: local, but Snakemake's executor is {executor}",
            f"use --profile {_profile(site)}, or name your centre's site file in the config: `site: my-centre.yaml`",
        )


def _profile(site: Site) -> Path:
    """Return the full path of the profile for a site: Snakemake looks for a relative one in the current folder."""
    return data_root() / "profiles" / site.scheduler


def _check_results_folder(folder: Path) -> Path:
    """Return the results folder, or the folder it will be made in; Snakemake would end in a traceback without this check."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder.absolute()} is not a folder", "move it away, or run with another --directory")
    existing = folder if folder.exists() else Path.cwd()
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {existing.absolute()}", "name a folder of your own with --directory")
    return existing


# What rules are declared with


class RuleSettings:
    """Resources, threads and parameters of the rules, all from the declarations of job kinds.

    Snakemake calls the returned functions with a job's wildcards, whose values are attributes.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._newest: tuple[JobId, float, dict[str, int | str]] | None = None

    def resources(self, kind: str) -> dict[str, Callable[[object], int | str | None]]:
        """Return a rule's `resources:`, from the Slurm request of its job. A key that the request lacks is left out."""

        def value(key: str) -> Callable[[object], int | str | None]:
            return lambda wildcards: self._resources(job_kinds()[kind].job_id(wildcards)).get(key)

        return {key: value(key) for key in RESOURCE_KEYS}

    def _resources(self, job: JobId) -> dict[str, int | str]:
        if self._newest is None or self._newest[0] != job or time.monotonic() > self._newest[1] + _REQUEST_VALID_S:
            request = submitted_request(self._plan_after_fetch(), job, Path.cwd())
            self._newest = job, time.monotonic(), request.as_resources()
        return self._newest[2]

    def _plan_after_fetch(self) -> Plan:
        """Return the plan, with what fetch pinned in this run: the nodes of a server follow from the model's size.

        An invalid lock changes nothing here; the jobs that read it name the cause.
        """
        if self._plan.lock is None and self._plan.paths.lock.exists():
            with suppress(UserError):
                self._plan = build_plan(self._plan.loaded, Lock.read(self._plan.paths.lock))
        return self._plan

    def threads(self, kind: str) -> Callable[[object], int]:
        """Return a rule's `threads:`: the cores that a job takes on this machine. On a cluster, resources say it.

        A job with GPUs takes all cores. Without Slurm, nobody else keeps two jobs from the same GPUs.
        """

        def threads(wildcards: object) -> int:
            if self._plan.site.scheduler != "local":
                return 1
            job_kind = job_kinds()[kind]
            request = job_request(self._plan, job_kind.job_id(wildcards))
            cores = request.tasks * request.cpus_per_task
            uses_gpus = request.gpus_per_node or (job_kind.uses_unrequested_gpu and self._plan.site.node.gpus)
            return ALL_CORES if uses_gpus else cores

        return threads

    def params(self, kind: str) -> dict[str, Callable[[object], str]]:
        """Return a rule's `params:`: `launch`, the script that the rule runs, and `spec`, which reruns the job on a change.

        launch.sh is no input, as a changed text must not run the job again; the main process writes it before any job.
        """
        paths = self._plan.paths

        def job_of(wildcards: object) -> JobId:
            return job_kinds()[kind].job_id(wildcards)

        return {
            "launch": lambda wildcards: str(paths.job(job_of(wildcards)).launch_script),
            "spec": lambda wildcards: job_rerun_key(self._plan, job_of(wildcards)),
        }


def plan_key(plan: Plan) -> str:
    """Return a hash of everything that the plan's JSON shows."""
    return content_hash([plan.config.model_dump(mode="json"), plan.site.model_dump(mode="json")])


def fetch_key(plan: Plan) -> str:
    """Return a hash of everything that fetch reads. The data of evaluation tasks have a rule of their own."""
    config = plan.config
    fetched = {n: d.model_dump(mode="json") for n, d in config.datasets.items() if d.hub or d.python_stdlib}
    return content_hash(
        [
            fetched,
            config.tokenizer.model_dump(mode="json"),
            config.model.pretrained and config.model.pretrained.model_dump(mode="json"),
        ]
    )


def task_data_key(plan: Plan, stage: str, task: str) -> str:
    """Return a hash of what decides which data an evaluation task loads. Another prompt for the same data pins nothing again."""
    own = own_task(plan.loaded, plan.stage(stage).stage, task)
    return content_hash([task, own and {key: value for key, value in own.config.items() if key.startswith("dataset_")}])


def scale_test_before_training(plan: Plan, stage: str) -> list[Path]:
    """Return the report that must exist before a stage trains: that of the most nodes, which all others precede.

    A stage that has begun is not tested again, so none is returned for it.
    """
    ladder = scale_ladder(plan)
    if not ladder.rungs or ladder.stage != stage:
        return []
    change = next(change for change in stage_changes(plan) if change.stage == stage)
    return [plan.paths.scale_test(max(ladder.rungs))] if change.action in (TRAINS, AGAIN) else []


def chats_before_training(plan: Plan, stage: str) -> list[Path]:
    """Return what must be counted before a stage trains: the conversations of all sft stages, so that none is refused later.

    For a finished stage only what exists: Snakemake trains it again where an input is missing, even if that is `ancient()`.
    """
    counts = [plan.paths.conversation_counts(*job.names) for job in job_kinds()["count_chats"].jobs(plan)]
    return [path for path in counts if path.exists()] if _stays_finished(plan, stage) else counts


def _stays_finished(plan: Plan, stage: str) -> bool:
    """Return whether a stage is finished with this result spec, by what the rule `train` compares."""
    folder = plan.paths.stage(stage)
    if not (folder.checkpoint.exists() and folder.result_spec.exists()):
        return False
    is_newer = folder.result_spec.stat().st_mtime > folder.checkpoint.stat().st_mtime
    return not is_newer and folder.result_spec.read_bytes().strip() == canonical_json(plan.stage(stage).spec).encode()


# The run's hooks, in the main process alone


_displays: list[RunDisplay] = []
"""The display of this main process, once Snakemake has read the rules; none in a dry run."""
_local_jobs: list[LocalJobs] = []
"""The jobs of this main process, once it starts jobs and where these run on this machine."""


def patch_snakemake(plan: Plan, is_main_process: bool) -> None:
    """Apply the patches that a run needs, before Snakemake compares inputs or makes an executor."""
    snakemake.ignore_order_only_inputs()
    snakemake.examine_jobs_behind_ancient_inputs()
    if not is_main_process:
        return
    if usual := snakemake.terminal_log():
        _replace_terminal_log(usual, plan)
    snakemake.limit_retries(retry_policy.allowed_restarts)
    if plan.site.scheduler == "slurm":
        slurm_plugin.send_no_guesses()
        slurm_plugin.patch_refused_submissions(record_refusal)
        requeue = slurm_client.requeue if plan.site.requeue else lambda job_id: "the site forbids requeue"
        slurm_plugin.name_jobs(plan.run)
        slurm_plugin.patch_check_active_jobs(
            slurm_plugin.SlurmActions(
                slurm_client.preempted_jobs, requeue, record_cancelled_wait, warner_of_waiting_jobs()
            )
        )


def _replace_terminal_log(usual: logging.Handler, plan: Plan) -> None:
    if _has_own_dry_run():
        from longhaul.scheduling.dry_run_lines import DryRunLines

        # Its few lines come from records that `--quiet rules` and `--quiet progress` leave out.
        snakemake.replace_terminal_log(usual, DryRunLines(plan).handle, with_quiet_ones=True)
    elif not snakemake.is_dry_run(usual):
        from longhaul.scheduling.run_display import RunDisplay  # imports rich, which a dry run can spare

        display = RunDisplay(plan.paths, len(planned_jobs(plan)))
        snakemake.replace_terminal_log(usual, display.handle)
        _displays.append(display)


def _has_own_dry_run() -> bool:
    """Return whether this is `longhaul run -n`; `snakemake -n` keeps Snakemake's own text."""
    usual = snakemake.terminal_log()
    return usual is not None and snakemake.is_dry_run(usual) and is_main_program()


def start_run(plan: Plan, jobs: Iterable[SnakemakeJob], keeps_going: bool) -> None:
    """Take the run's lease, refuse what would only fail again, and write the files that the jobs are started with.

    A second main process of the same run is refused.

    jobs:        Snakemake's jobs that are about to run
    keeps_going: Snakemake starts other jobs when one has failed and does not start again (--keep-going)
    """
    from longhaul.scheduling.find_software import require_software  # imports rich, which a dry run can spare

    RunLease(plan.paths.lease).acquire_or_exit(slurm_client.job_has_ended)
    disk_space.print_full_disk_at_exit(RESULTS)
    _or_exit(require_software, plan.site)
    if any(starts_engine(stage.stage) for stage in plan.stages):
        _or_exit(check_packages_here, plan.site.serving)
    _or_exit(require_enough_nodes, plan, Path.cwd())
    write_launch_files(plan, Path.cwd())
    _write_changed_plan(plan)
    jobs = list(jobs)
    _or_exit(retry_policy.refuse_known_failures, jobs)
    retry_policy.print_failures_at_exit(plan.paths)
    _record_jobs_to_run(plan.paths, jobs)
    runs_here = plan.site.scheduler == "local"
    for display in _displays:
        display.start(jobs, keeps_going, runs_here)
    if runs_here:
        _local_jobs.append(LocalJobs())
        _local_jobs[-1].end_at_signal()


def _write_changed_plan(plan: Plan) -> None:
    """Write plan.json where it is missing or of another config: `longhaul status` reads it before the rule `render` has run.

    Then `render` runs in this run, too. A plan.json that is up to date keeps its time, as the report depends on it.
    """
    value = json.loads(canonical_json(plan_json(plan)))
    try:
        is_current = read_json(plan.paths.plan) == value
    except UserError:  # missing or damaged
        is_current = False
    if not is_current:
        write_json(plan.paths.plan, value)


def _record_jobs_to_run(paths: RunPaths, jobs: Iterable[SnakemakeJob]) -> None:
    """Record the jobs that this run has to run. Their own files say `done` where an earlier run has done them.

    A run that is stopped leaves the file: these jobs are still to be run. The next run replaces or removes it.
    """
    folders = filter(None, map(retry_policy.job_folder_of, jobs))
    left = {job_of(folder): state.since if (state := read_state(folder)) else "" for folder in folders}
    JobsToRun(current_invocation(paths), left).write(paths.jobs_to_run)


def finish_run(plan: Plan) -> None:
    """Show the summary, and cancel what would be printed at exit: a run that succeeded has no failure to explain."""
    plan.paths.jobs_to_run.unlink(missing_ok=True)
    disk_space.cancel_print_at_exit()
    retry_policy.cancel_print_at_exit()
    for display in _displays:
        display.finish()


def fail_run(workflow: Any, plan: Plan) -> None:
    """Write the report and show the summary of a run that failed or was stopped.

    After a signal, wait for local jobs before, and exit with the signal's code: Snakemake would exit with 1.
    """
    for jobs in _local_jobs:
        jobs.wait_until_ended()
    problem = report_failed_run(workflow, plan.paths)
    for display in _displays:
        with suppress(OSError):  # the terminal may be closed
            display.fail(problem)
    for jobs in _local_jobs:
        if jobs.received:
            sys.exit(128 + jobs.received)
