"""What every mistake of a user must meet: one clear message with a remedy, exit code 2, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from longhaul.cli import main
from tests.support.chain import REPOSITORY


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs one verb, which must end with exit code 2; its message, which must name a remedy."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    output = capsys.readouterr()
    assert ended.value.code == 2, output.err
    assert output.err.startswith("error: ") and "\n  remedy: " in output.err, output.err
    assert "Traceback" not in output.err + output.out
    return output.err


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    where = ["-s", str(REPOSITORY / "Snakefile"), "--directory", str(folder)]
    profile = ["--profile", str(REPOSITORY / "profiles" / "local")]
    command = [sys.executable, "-m", "snakemake", *where, *profile, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
