"""
Reads the config into a plan, and gives the rules what they share: paths, resources and triggers.
Nothing here decides anything about training; longhaul.planning does.

A rule's `conda:` names the environment it needs; which one a job enters is the site file's word, and launch.sh does it.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir) / "workflow"))

from longhaul.artifacts.files import canonical_json
from longhaul.scheduling.rule_helpers import (
    RESOURCE_KEYS,
    ignore_order_only_inputs,
    load_run_plan,
    or_exit,
    order_only,
    plan_key,
    source_key,
    spec_key,
)
from longhaul.artifacts.leases import RunLease
from longhaul.jobs.builders import repository_sources, shared_artifacts
from longhaul.planning import lock_path
from longhaul.scheduling import disk_space as room
from longhaul.scheduling import retry_policy as verdict
from longhaul.scheduling.resource_requests import require_nodes, submitted_request
from longhaul.compat.slurm_plugin import patch_slurm_executor
from longhaul.scheduling.slurm_client import job_has_ended
from longhaul.jobs.launch_files import job_folder, render_run, stage_folder

CONFIG, PLAN = load_run_plan(workflow)
ignore_order_only_inputs()
# Shell commands on this machine call `longhaul <verb>`.
shell.prefix(
    "set -euo pipefail; "
    f'longhaul() {{{{ PYTHONPATH={shlex.quote(workflow.basedir)}/workflow {shlex.quote(sys.executable)} -m longhaul "$@"; }}}}; '
)
if workflow.is_main_process:
    verdict.end_retries()
    if PLAN.site.scheduler == "slurm":
        patch_slurm_executor(PLAN.site.requeue)
LOCK = [str(lock_path(PLAN.run))] if PLAN.needs_fetch else []


wildcard_constraints:
    run=PLAN.run,
    stage="|".join(stage.name for stage in PLAN.stages),
    dataset="|".join(sorted(PLAN.used_datasets)),
    share=r"\d+",
    shares=r"\d+",


def job_resources(job_of):
    """Resources of a rule, straight from its job's SlurmRequest; a key the request lacks is left out."""

    def request(wildcards):
        return submitted_request(PLAN, job_of(wildcards), Path.cwd())

    def value(key):
        return lambda wildcards: request(wildcards).as_resources().get(key)

    return {key: value(key) for key in RESOURCE_KEYS}


def job_threads(job_of):
    """Cores a job holds on this machine; on a cluster the resources say it."""

    def threads(wildcards):
        request = PLAN.request(job_of(wildcards))
        return (
            request.tasks * request.cpus_per_task
            if PLAN.site.scheduler == "local"
            else 1
        )

    return threads


def launch_of(job):
    """No input of a rule, as its text is no cause to run a job again; the main process writes it before any job starts."""
    verb, _, name = job.partition("-")
    folder = stage_folder(PLAN, name) if verb == "train" else job_folder(PLAN, job)
    return f"{folder}/launch.sh"


def encode_job(wildcards):
    return f"encode-{wildcards.dataset}-{wildcards.share}"


def text_of_tokenizer(wildcards):
    train = PLAN.config.tokenizer.train
    return [
        path
        for name in (train.datasets if train else ())
        for path in repository_sources(PLAN, name)
    ]


def starting_checkpoint(wildcards):
    start = PLAN.stage(wildcards.stage).stage.start_from
    return f"results/{PLAN.run}/stages/{start.stage}/checkpoint.json" if start else []


def finished_stages():
    return [
        f"results/{PLAN.run}/stages/{stage.name}/checkpoint.json"
        for stage in PLAN.stages
    ]


def exports():
    return [f"results/{PLAN.run}/export/{stage}.json" for stage in PLAN.exported]


def start_run():
    """One main Snakemake per run, a second one is refused by name; it writes what the jobs are started with."""
    if workflow.is_main_process:
        RunLease(Path("results") / f"{PLAN.run}.lease.json").take(job_has_ended)
        room.tell_at_exit(Path("results"))
        or_exit(require_nodes, PLAN, Path.cwd())
        render_run(PLAN, Path.cwd())
        or_exit(verdict.refuse_known_failures, workflow.dag.needrun_jobs())
        verdict.tell_failures_at_exit(Path("results") / PLAN.run)


def call_off():
    """A run that succeeded has nothing to explain."""
    room.call_off()
    verdict.call_off()
