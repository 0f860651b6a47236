"""Parsing the rules imports nothing heavy, and refuses software deployment by Snakemake."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from longhaul.planning.load_plan import load_plan
from longhaul.report.plan_json import planned_jobs
from tests.support.pipeline_run import REPOSITORY
from tests.support.small_configs import write_config

HEAVY = {"torch", "deepspeed", "transformers", "datasets", "tokenizers", "plotly", "rich"}


def run(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def imported(*arguments: str, cwd: Path) -> set[str]:
    """Return the top-level packages that a Python process imports."""
    return {name.partition(".")[0] for name in imported_modules(*arguments, cwd=cwd)}


def imported_modules(*arguments: str, cwd: Path) -> set[str]:
    done = run("-X", "importtime", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def test_dry_run_imports_nothing_heavy(tmp_path: Path):
    config = write_config(tmp_path)
    words = ["-m", "snakemake", "-s", str(REPOSITORY / "Snakefile"), "--directory", str(tmp_path), "-n", "--profile"]
    found = imported(*words, str(REPOSITORY / "profiles" / "slurm"), "--configfile", str(config), cwd=tmp_path)
    assert "longhaul" in found and "snakemake" in found
    assert found & HEAVY == set()


def test_dry_run_of_longhaul_run_spares_the_slurm_plugins_pandas(tmp_path: Path):
    words = ["-m", "longhaul.scheduling.snakemake_main", "-s", str(REPOSITORY / "Snakefile"), "-n"]
    where = ["--directory", str(tmp_path), "--profile", str(REPOSITORY / "profiles" / "slurm")]
    found = imported_modules(*words, *where, "--configfile", str(write_config(tmp_path)), cwd=tmp_path)
    assert "snakemake_executor_plugin_slurm.partitions" in found and "longhaul.planning.plan" in found
    assert found & {"pandas.core", "numpy.linalg"} == set()


@pytest.mark.parametrize("memory", ["per_node", "all", "omit"])
def test_dry_run_with_every_kind_of_memory_request(tmp_path: Path, memory: str):
    """Snakemake refuses a function of mem_mb that returns None."""
    config = write_config(tmp_path, {}, {"partitions.0.memory": memory})
    words = ["-m", "snakemake", "-s", str(REPOSITORY / "Snakefile"), "--directory", str(tmp_path), "-n", "--profile"]
    done = run(*words, str(REPOSITORY / "profiles" / "slurm"), "--configfile", str(config), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("site", sorted((REPOSITORY / "config" / "sites").glob("*.yaml")), ids=lambda path: path.stem)
def test_dry_run_at_every_shipped_site(tmp_path: Path, site: Path):
    config = write_config(tmp_path, {"site": site.stem})
    words = ["-m", "longhaul", "run", str(config), "-n", "--directory", str(tmp_path)]
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train " in done.stdout + done.stderr


def test_report_imports_no_torch(tmp_path: Path):
    assert "torch" not in imported("-c", "import longhaul.report.html_page", cwd=tmp_path)


def test_a_check_of_an_engine_with_its_own_environment_needs_only_the_controllers(tmp_path: Path):
    found = imported("-c", "import longhaul.serving.check_server", cwd=tmp_path)
    assert found & (HEAVY | {"safetensors"}) == set()


@pytest.mark.parametrize("profile", ["local", "slurm"])
def test_dry_run_of_the_demo_lists_all_rules(tmp_path: Path, profile: str):
    config = yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text())
    config["site"] = {"local": "local", "slurm": str(REPOSITORY / "tests" / "support" / "cluster_site.yaml")}[profile]
    named = tmp_path / "config" / "run.yaml"
    named.parent.mkdir()
    named.write_text(yaml.safe_dump(config))
    folder = tmp_path / "run"
    folder.mkdir()
    where = ["-s", str(REPOSITORY / "Snakefile"), "--directory", str(folder), "--configfile", str(named)]
    done = run("-m", "snakemake", *where, "-n", "--profile", str(REPOSITORY / "profiles" / profile))
    assert done.returncode == 0, done.stderr
    rules = [
        "fetch",
        "environment",
        "fabric",
        "tokenizer",
        "tokenize",
        "count_chats",
        "render",
        "train",
        "export",
        "evaluate",
        "report",
    ]
    assert [rule for rule in rules if f"rule {rule}:" not in done.stdout] == []
    assert list(folder.iterdir()) in ([], [folder / ".snakemake"]), "a dry run writes nothing"


def test_dry_run_with_a_server_check_lists_its_rule(tmp_path: Path):
    check = {"stages.1.export": "last", "stages.1.serve_check": {}}
    config = write_config(tmp_path, check, {"serving": {"engine": "vllm", "python": [sys.executable]}})
    done = run("-m", "longhaul", "run", str(config), "-n", "--directory", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "serve_check" in done.stdout


def test_dry_run_of_longhaul_run_says_what_happens_to_stages_and_how_many_jobs_run(tmp_path: Path):
    """`snakemake -n` prints files and reasons of every job. Both count, and print, what differs in their own words."""
    config = write_config(tmp_path)
    planned = len(planned_jobs(load_plan(config)))
    done = run("-m", "longhaul", "run", config.name, "-n", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *stages, count, end = done.stdout.splitlines()
    assert stages[0] == "Stages:" and stages[1].startswith("  stage base trains for the first time")
    assert count.startswith(f"{planned} of {planned} jobs to run: ") and ", train (2); beside them: " in count
    assert end == "This was a dry run: nothing was started."
    for raw in ("input:", "jobid", "Job stats", "--cleanup-metadata", "Building DAG"):
        assert raw not in done.stdout + done.stderr
    assert not (tmp_path / "results").exists()
    for quiet in ("rules", "progress"):
        assert run("-m", "longhaul", "run", config.name, "-n", "--quiet", quiet, cwd=tmp_path).stdout == done.stdout


def test_software_deployment_by_snakemake_is_refused():
    done = run("-m", "snakemake", "-n", "--sdm", "conda")
    assert done.returncode == 2 and "software-deployment-method is conda" in done.stderr


def test_fewer_rerun_triggers_are_refused():
    done = run("-m", "snakemake", "-n", "--rerun-triggers", "mtime")
    assert done.returncode == 2 and "--rerun-triggers lacks params, input" in done.stderr


def test_snakemake_lint_only_misses_environments():
    """The site file, not the rules, names the environment of a job."""
    done = run("-m", "snakemake", "--lint")
    findings = set(re.findall(r"^    \* (.*):$", done.stderr, flags=re.MULTILINE))
    assert findings <= {"Specify a conda environment or container for each rule."}, done.stderr
