"""
Reads the config into a plan; has wildcards, inputs and JOBS, which all rules use. longhaul.planning decides; nothing here does.
"""

import gc
import shlex
import sys
from pathlib import Path

# In a checkout the package is beside this folder. An installed longhaul is imported from where it is installed.
RULES = Path(workflow.current_basedir.get_path_or_uri(secret_free=True))
if (RULES.parent / "longhaul").is_dir():
    sys.path.insert(0, str(RULES.parent))

# Snakemake's modules are no garbage: the collector need not look through them while the package is imported.
gc.freeze()

from longhaul.artifacts.atomic_files import canonical_json
from longhaul.compat.snakemake import order_only, run_hooks_in_module
from longhaul.config.shipped_files import PACKAGE
from longhaul.jobs.job_kind import job_kinds
from longhaul.jobs.kinds.evaluate_job import evaluation_inputs
from longhaul.jobs.kinds.scale_test_job import scale_test_before
from longhaul.jobs.kinds.tokenize_jobs import shared_artifacts
from longhaul.scheduling.snakefile_functions import (
    RuleSettings,
    chats_before_training,
    fail_run,
    fetch_key,
    finish_run,
    load_run_plan,
    patch_snakemake,
    plan_key,
    scale_test_before_training,
    start_run,
    task_data_key,
)

CONFIG, PLAN = load_run_plan(workflow)
JOBS = RuleSettings(PLAN)
LOCK = [PLAN.paths.lock] if PLAN.needs_fetch else []
patch_snakemake(PLAN, workflow.is_main_process)
# Shell commands on this machine call `longhaul <verb>`.
shell.prefix(
    "set -euo pipefail; longhaul() {{ "
    f'PYTHONPATH={shlex.quote(str(PACKAGE.parent))} {shlex.quote(sys.executable)} -m longhaul "$@"; '
    "}}; "
)


wildcard_constraints:
    run=PLAN.run,
    stage="|".join(stage.name for stage in PLAN.stages),
    dataset="|".join(sorted(PLAN.used_datasets)),
    model="trained|start",
    task=r"[A-Za-z0-9._-]+",
    nodes=r"\d+",
    partition=r"\d+",
    partitions=r"\d+",


def tokenizer_text(wildcards):
    train = PLAN.config.tokenizer.train
    return [
        path
        for name in (train.datasets if train else ())
        for path in PLAN.rule_inputs(name)
    ]


def stage_data(wildcards):
    return PLAN.paths.manifest(PLAN.stage(wildcards.stage).stage.dataset)


def counted_chats(wildcards):
    counts = order_only(chats_before_training(PLAN, wildcards.stage))
    return [ancient(path) for path in counts]


def starting_checkpoint(wildcards):
    start = PLAN.stage(wildcards.stage).stage.start_from
    return PLAN.paths.stage(start.stage).checkpoint if start else []


def fewer_nodes(wildcards):
    return [
        ancient(str(path)) for path in scale_test_before(PLAN, int(wildcards.nodes))
    ]


def passed_scale_test(wildcards):
    reports = order_only(scale_test_before_training(PLAN, wildcards.stage))
    return [ancient(path) for path in reports]


def finished_stages():
    return [PLAN.paths.stage(stage.name).checkpoint for stage in PLAN.stages]


def exports():
    return [PLAN.paths.export_manifest(stage) for stage in PLAN.exported]


def evaluations():
    jobs = job_kinds()["evaluate"].jobs(PLAN)
    return [PLAN.paths.evaluation(*job.names) for job in jobs]


def serve_checks():
    jobs = job_kinds()["serve_check"].jobs(PLAN)
    return [PLAN.paths.serve_check(*job.names) for job in jobs]


def on_start():
    if workflow.is_main_process:
        start_run(
            PLAN,
            workflow.dag.needrun_jobs(),
            workflow.execution_settings.keep_going,
        )


def on_error():
    if workflow.is_main_process:
        fail_run(workflow, PLAN)


run_hooks_in_module(workflow, on_start, lambda: finish_run(PLAN), on_error)
