"""Mistakes in how Snakemake and longhaul are called, told before any job starts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.bad_input import refused, snakemake
from tests.support.chain import REPOSITORY
from tests.support.small_configs import write_config

CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str], str]] = {
    "a mistake in the config": ({"stages.0.steps": 0}, {}, [], "stages.0.steps is 0"),
    "a value on the command line": ({}, {}, ["--config", "seed=4"], "--config sets seed"),
    "two configs": ({}, {}, [str(REPOSITORY / "config" / "config.yaml")], "--configfile names 2 files"),
    "a Slurm site without Slurm": ({}, {}, [], "use --profile profiles/slurm"),
    "the same in a dry run": ({}, {}, ["-n", "-j4"], "use --profile profiles/slurm"),
    "this machine through Slurm": (
        {},
        {"scheduler": "local", "max_nodes": 1},
        ["-n", "--executor", "slurm", "-j4"],
        "site centre has scheduler: local, but Snakemake's executor is slurm",
    ),
}


@pytest.mark.parametrize(("changes", "site", "arguments", "says"), CALLS.values(), ids=CALLS)
def test_snakemake_says_so_before_any_job(
    tmp_path: Path, changes: dict[str, Any], site: dict[str, Any], arguments: list[str], says: str
):
    config = write_config(tmp_path / "config", changes, site)
    run = tmp_path / "run"
    run.mkdir()
    done = snakemake(run, "--configfile", str(config), *arguments)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "remedy: " in done.stderr
    assert not (run / "results").exists()


UNREADABLE: dict[str, tuple[str, list[str], str]] = {
    "no such file": ("no.yaml", ["-n"], "no.yaml does not exist"),
    "a folder": (".", ["-n"], "is a folder"),
    "broken YAML": ("broken.yaml", ["-n"], "broken.yaml is not valid YAML: expected"),
    "a second config": ("run.yaml", ["-n", "--configfile=other.yaml"], "--configfile=other.yaml names a second config"),
}


@pytest.mark.parametrize(("config", "options", "says"), UNREADABLE.values(), ids=UNREADABLE)
def test_run_reads_the_config_before_snakemake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, options: list[str], says: str
):
    write_config(tmp_path)
    (tmp_path / "broken.yaml").write_text("run: [a\nseed: 1\n")
    assert says in refused(capsys, "run", str(tmp_path / config), *options)


def test_run_becomes_snakemake(tmp_path: Path):
    """Options and targets arrive, and the config is that file."""
    config = write_config(tmp_path, None, {"scheduler": "local", "max_nodes": 1})
    words = ["-m", "longhaul", "run", config.name, "results/small/plan.json", "-n", "--profile", "none"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^render +1$", done.stdout, re.MULTILINE) and "train_stage" not in done.stdout


def test_a_working_folder_that_no_script_can_name(tmp_path: Path):
    config = write_config(tmp_path / "config", None, {"scheduler": "local", "max_nodes": 1})
    run = tmp_path / "costs $5"
    run.mkdir()
    done = snakemake(run, "-n", "--configfile", str(config))
    assert done.returncode == 2 and "holds '$'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "remedy: " in done.stderr


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    """A file stands where results/ has to be: root may write wherever a mode forbids it."""
    config = write_config(tmp_path / "config")
    (tmp_path / "results").write_text("")
    done = snakemake(tmp_path, "--configfile", str(config))
    assert done.returncode == 2, done.stderr
    assert "results" in done.stderr and "remedy: " in done.stderr and "Traceback" not in done.stderr
