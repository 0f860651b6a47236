"""The process that `longhaul run` becomes says in one line that Ctrl-C ended it before its first job."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from longhaul.scheduling.snakemake_main import LEASE_OPTION

_PROGRAM = """
import runpy, sys, types
fake = types.ModuleType("snakemake.cli")
def main(): raise {error}
fake.main = main
sys.modules["snakemake.cli"] = fake
runpy.run_module("longhaul.scheduling.snakemake_main", run_name="__main__", alter_sys=True)
"""


def started(lease: Path, error: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", _PROGRAM.format(error=error), LEASE_OPTION, str(lease)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def test_ctrl_c_before_the_first_job_is_one_line_and_releases_the_run(tmp_path: Path) -> None:
    ended = started(tmp_path / "r.lease.json", "KeyboardInterrupt")
    assert ended.stderr == "stopped by Ctrl-C; the same command starts or continues the run\n"
    assert ended.returncode == 128 + signal.SIGINT and not list(tmp_path.iterdir())


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    ended = started(tmp_path / "r.lease.json", "ValueError(1)")
    assert ended.returncode == 1 and "Traceback" in ended.stderr and "ValueError: 1" in ended.stderr
