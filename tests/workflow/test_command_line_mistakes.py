"""Mistakes in calls of Snakemake and longhaul. They are reported before any job starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longhaul.cli import main
from tests.support.check_user_errors import files_below, refused_message, snakemake
from tests.support.corpora import dataset, make_tokenizer, text, tokenize_job, write_jsonl
from tests.support.pipeline_run import REPOSITORY
from tests.support.run_module_in_forks import ForkedModule
from tests.support.small_configs import LOCAL, write_config
from tests.support.supervised_job import folder_of, write_job

CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str], str]] = {
    "mistake in the config": ({"stages.0.steps": 0}, {}, [], "stages.base.steps is 0"),
    "config value on the command line": ({}, {}, ["--config", "seed=4"], "--config sets seed"),
    "two configs": ({}, {}, [str(REPOSITORY / "config" / "config.yaml")], "2 config files are named"),
    "Slurm site without the Slurm executor": ({}, {}, [], f"use --profile {REPOSITORY}/profiles/slurm"),
    "Slurm site without the Slurm executor in a dry run": (
        *({}, {}, ["-n", "-j4"]),
        f"use --profile {REPOSITORY}/profiles/slurm",
    ),
    "local site with the Slurm executor": (
        {},
        LOCAL,
        ["-n", "--executor", "slurm", "-j4"],
        "site centre has scheduler: local, but Snakemake's executor is slurm",
    ),
}


@pytest.mark.parametrize(("changes", "site", "arguments", "expected"), CALLS.values(), ids=CALLS)
def test_snakemake_reports_mistake_before_any_job(
    tmp_path: Path, changes: dict[str, Any], site: dict[str, Any], arguments: list[str], expected: str
):
    config = write_config(tmp_path / "config", changes, site)
    run = tmp_path / "run"
    run.mkdir()
    done = snakemake(run, "--configfile", str(config), *arguments)
    assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "remedy: " in done.stderr
    assert not (run / "results").exists()


WORKFLOW = ["-s", str(REPOSITORY / "Snakefile"), "--profile", str(REPOSITORY / "profiles" / "local")]
FOLLOWED: dict[str, tuple[dict[str, Any], list[str], str, dict[str, Any], list[str]]] = {
    "two configs": (LOCAL, [str(REPOSITORY / "config" / "config.yaml")], "name one", LOCAL, []),
    "config value": (LOCAL, ["--config", "seed=4"], "write it into the config file", {**LOCAL, "seed": 4}, []),
    "software deployment": (LOCAL, ["--software-deployment-method", "conda"], "drop the option", LOCAL, []),
    "fewer rerun triggers": (LOCAL, ["--rerun-triggers", "mtime"], "drop the option", LOCAL, []),
    "local profile": ({}, [], "use --profile {slurm}", {}, ["--profile", "{slurm}"]),
    "local profile, other site": ({}, [], "`site: local`", {"site": "local"}, []),
    "Slurm's profile": (LOCAL, ["--profile", "{slurm}"], "use --profile {local}", LOCAL, ["--profile", "{local}"]),
    "Slurm's profile, other site": (
        LOCAL,
        ["--profile", "{slurm}"],
        "name your centre's site",
        {},
        ["--profile", "{slurm}"],
    ),
}
"""Name -> bad site, bad options, remedy, better keys of the config or the site file, better options."""


@pytest.fixture(scope="module")
def forked_snakemake() -> Iterator[ForkedModule]:
    forked = ForkedModule("snakemake", ("snakemake.cli", "longhaul.scheduling.snakefile_functions"), os.environ)
    yield forked
    forked.close()


@pytest.mark.parametrize(("site", "bad", "says", "changes", "better"), FOLLOWED.values(), ids=FOLLOWED)
def test_after_the_remedy_snakemake_plans_the_run(
    tmp_path: Path,
    forked_snakemake: ForkedModule,
    site: dict[str, Any],
    bad: list[str],
    says: str,
    changes: dict[str, Any],
    better: list[str],
):
    profiles = {name: str(REPOSITORY / "profiles" / name) for name in ("local", "slurm")}

    def plan(config: Path, options: list[str]) -> subprocess.CompletedProcess[str]:
        words = [word.format(**profiles) for word in options]
        words += [] if "--profile" in words else ["--profile", profiles["local"]]
        where = ["-n", "-s", str(REPOSITORY / "Snakefile"), "--configfile", str(config)]
        return forked_snakemake.run(*where, *words, cwd=tmp_path, environment=os.environ)

    refused = plan(write_config(tmp_path / "config", {}, site), bad)
    assert refused.returncode == 2 and says.format(**profiles) in refused.stderr.partition("remedy: ")[2], (
        refused.stderr
    )
    of_config = {key: value for key, value in changes.items() if key in ("site", "seed")}
    of_site = {key: value for key, value in changes.items() if key not in of_config}
    done = plan(write_config(tmp_path / "config", of_config, of_site), better)
    assert done.returncode == 0, done.stderr


UNREADABLE: dict[str, tuple[str, list[str], str]] = {
    "missing file": ("no.yaml", ["-n"], "no.yaml does not exist"),
    "folder": (".", ["-n"], "is a folder"),
    "invalid YAML": ("broken.yaml", ["-n"], "broken.yaml is not valid YAML: expected"),
    "second config": ("run.yaml", ["-n", "--configfile=other.yaml"], "--configfile=other.yaml names a second config"),
}


@pytest.mark.parametrize(("config", "options", "expected"), UNREADABLE.values(), ids=UNREADABLE)
def test_run_checks_config_before_snakemake_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, options: list[str], expected: str
):
    write_config(tmp_path)
    (tmp_path / "broken.yaml").write_text("run: [a\nseed: 1\n")
    assert expected in refused_message(capsys, "run", str(tmp_path / config), *options)


def test_run_passes_options_targets_and_config_to_snakemake(tmp_path: Path):
    config = write_config(tmp_path, None, LOCAL)
    words = ["-m", "longhaul", "run", config.name, "results/small/plan.json", "-n", "--profile", "none"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 of 8 jobs to run; beside them: fetch, render\n" in done.stdout and "train" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (["data", "inspect", "none.json"], "none.json does not exist", "longhaul run CONFIG"),
        (["data", "inspect", "."], ". is a folder, not a file", "give the path of a file"),
        (["job", "supervise", "."], ". is a folder; the file launch.json of a job is expected", "name launch.json"),
        (["job", "run", "train", "."], ". is a folder; the file job.json of a job is expected", "name job.json"),
    ],
    ids=["no manifest", "folder as a manifest", "folder to supervise", "folder to run"],
)
def test_file_of_a_run_that_is_not_there_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
    remedy: str,
):
    monkeypatch.chdir(tmp_path)
    printed = refused_message(capsys, *arguments)
    assert message in printed and remedy in printed.partition("remedy:")[2]


def test_a_job_runs_after_its_kind_and_its_file_are_named_as_the_remedies_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    corpus = write_jsonl(tmp_path / "texts.jsonl", "text", (text(i) for i in range(20)))
    make_tokenizer(tmp_path, [corpus])
    job = tokenize_job(tmp_path, tmp_path, [corpus], dataset())
    job.write(tmp_path / "job.json")
    kinds = refused_message(capsys, "job", "run", "tokenise", "job.json").partition("use one of ")[2]
    assert "tokenize" in kinds.strip().split(", ")
    assert "remedy: name job.json" in refused_message(capsys, "job", "run", "tokenize", ".")
    supervised = write_job(tmp_path, "print('step')")
    named = folder_of(supervised).launch_spec
    assert f"remedy: name {named}" in refused_message(capsys, "job", "supervise", supervised.folder)
    for words in (["run", "tokenize", "job.json"], ["supervise", str(named)]):
        with pytest.raises(SystemExit) as ended:
            main(["job", *words])
        assert not ended.value.code


def test_working_folder_with_unusable_name_is_reported_until_it_has_another(
    tmp_path: Path, forked_snakemake: ForkedModule
):
    config = write_config(tmp_path / "config", None, LOCAL)
    run = tmp_path / "costs $5"
    run.mkdir()
    words = ["-n", *WORKFLOW, "--configfile", str(config)]
    done = forked_snakemake.run(*words, cwd=run, environment=os.environ)
    assert done.returncode == 2 and "contains '$'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "remedy: run in a folder whose name has no quotes, $," in done.stderr
    run = run.rename(tmp_path / "costs 5")
    assert forked_snakemake.run(*words, cwd=run, environment=os.environ).returncode == 0


def test_results_folder_that_cannot_be_created_is_reported(tmp_path: Path):
    """A file has the name of the results folder. File modes cannot be used here: they do not restrict root."""
    config = write_config(tmp_path / "config", None, LOCAL)
    (tmp_path / "results").write_text("")
    done = snakemake(tmp_path, "-n", "--configfile", str(config))
    assert done.returncode == 2, done.stderr
    assert "remedy: move it away" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "results").rename(tmp_path / "away")
    assert snakemake(tmp_path, "-n", "--configfile", str(config)).returncode == 0


def test_a_folder_is_no_file_to_write(tmp_path: Path):
    config = write_config(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "longhaul", "plan", str(config), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "Invalid value for '--out'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("out", ["run.yaml/plan.json", "pipe"])
def test_plan_is_not_written_where_no_file_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str):
    """A pipe, or a device, would be replaced."""
    config = write_config(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    place = tmp_path / out
    before = place.lstat() if place.exists() else None
    assert str(place) in refused_message(capsys, "plan", str(config), "--out", str(place))
    assert before is None or place.lstat().st_ino == before.st_ino


@pytest.mark.parametrize("arguments", [("job", "supervise", "."), ("report", "run.yaml")], ids=["supervise", "report"])
def test_a_path_of_another_kind_ends_in_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
):
    """`supervise` reads a launch spec and `report` reads a folder of results."""
    write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    refused_message(capsys, *arguments)
    assert files_below(tmp_path) == {"run.yaml", "site.yaml"}


def test_text_that_the_terminal_cannot_show_is_escaped(tmp_path: Path):
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "longhaul", "plan", "北京.yaml"],
        env=ascii_only,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: \\u5317\\u4eac.yaml does not exist"), done.stderr
