"""Snakemake's faults that compat/snakemake.py works around are still there. If a test fails, a patch can go."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SNAKEFILE = """
if config["patched"] == "yes":
    from longhaul.compat.snakemake import examine_jobs_behind_ancient_inputs
    examine_jobs_behind_ancient_inputs()

rule check:
    output: "check"
    params: key=config["key"]
    shell: "touch {output}"

rule other:
    output: "other"
    shell: "touch {output}"

rule work:
    input: check=ancient("check"), other="other"
    output: "work"
    shell: "date +%N > {output}"

rule end:
    input: "work"
    output: "end"
    shell: "touch {output}"
"""


def run(folder: Path, key: str, patched: bool, *arguments: str) -> set[str]:
    """Run the rules in `folder` and return the names of the rules that ran, or would run."""
    settings = ["--config", f"key={key}", f"patched={'yes' if patched else 'no'}"]
    words = [sys.executable, "-m", "snakemake", "--rerun-triggers", "params", "mtime", "input", "--cores", "1"]
    done = subprocess.run([*words, *settings, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    lines = (done.stdout + done.stderr).splitlines()
    return {line.split()[-1].rstrip(":") for line in lines if line.startswith(("rule ", "localrule "))}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all rules have run, with the parameter 1."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    folder.mkdir()
    (folder / "Snakefile").write_text(SNAKEFILE)
    assert run(folder, "1", True, "--", "end") == {"check", "other", "work", "end"}
    return folder


CHANGES = {
    "missing target": ("rm work end", ["--", "work"]),
    "changed input": ("rm end; echo new > other", ["--", "end"]),
    "forced": ("", ["--forcerun", "work", "--", "end"]),
    "until": ("echo new > other", ["--until", "work", "--", "end"]),
}


@pytest.mark.parametrize(("name", "patched"), [("missing target", False), *((name, True) for name in CHANGES)])
def test_a_job_behind_an_ancient_input_is_examined(name: str, patched: bool, built: Path, tmp_path: Path):
    """`check` runs again, as its parameter changed; `work` has a reason of its own to run."""
    prepare, arguments = CHANGES[name]
    folder = Path(shutil.copytree(built, tmp_path / "run"))
    subprocess.run(prepare, shell=True, cwd=folder, check=True)
    would_run = run(folder, "2", patched, "--dry-run", *arguments)
    assert "check" in would_run
    assert ("work" in would_run) == patched


def test_a_job_without_a_reason_does_not_run(built: Path, tmp_path: Path):
    folder = Path(shutil.copytree(built, tmp_path / "run"))
    assert run(folder, "2", True, "--dry-run", "--", "end") == {"check"}
