"""Helpers for tests of user errors: one message with a remedy, exit code 2, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from longhaul.cli import main
from tests.support.pipeline_run import REPOSITORY


def refused_message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a verb that must exit with code 2 and a remedy. Return its message."""
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    output = capsys.readouterr()
    assert exited.value.code == 2, output.err
    assert output.err.startswith("error: ") and "\n  remedy: " in output.err, output.err
    assert "Traceback" not in output.err + output.out
    return output.err


def files_below(folder: Path) -> set[str]:
    """Return the relative paths of all files and folders below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the workflow in a folder with the local profile."""
    where = ["-s", str(REPOSITORY / "Snakefile"), "--directory", str(folder)]
    profile = ["--profile", str(REPOSITORY / "profiles" / "local")]
    command = [sys.executable, "-m", "snakemake", *where, *profile, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
