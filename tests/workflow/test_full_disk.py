"""A disk that is too full for a run's records: the terminal shows what is needed and where, because no log can."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.pipeline_run import PipelineRun, tiny_config

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")

MESSAGE = "writing the run's records needs 1048576 bytes (0.00 GiB) of free space in {folder}"
MOUNT = "mount -t tmpfs -o size=8m none {folder}; cp -r {folder}.before/. {folder}; "
FILL = "cat /dev/zero > {folder}/filler 2> /dev/null; "
FILL_WHEN_IT_RUNS = (
    "(until [ -e {folder}/results/tiny/jobs/tokenizer/state.json ]; do sleep 0.02; done; " + FILL + ") & "
)


def run_on_small_disk(folder: Path, before: str) -> subprocess.CompletedProcess[str]:
    """Run the tokenizer job on a file system of 8 MiB in a new mount namespace. `before`: shell commands to run first."""
    chain = PipelineRun(folder, tiny_config())
    folder.rename(folder.with_name(f"{folder.name}.before"))
    folder.mkdir()
    script = (MOUNT + before).format(folder=folder) + 'cd "$0" && exec "$@"'
    command = ["unshare", "--mount", "bash", "-c", script, str(folder)]
    command += chain.command("results/tiny/tokenizer.json")
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=chain.environment(), check=False)


def test_full_disk_is_reported_before_any_job(tmp_path: Path):
    done = run_on_small_disk(tmp_path / "disk", FILL)
    assert done.returncode == 2, done.stderr
    assert MESSAGE.format(folder=tmp_path / "disk") in done.stderr and "remedy: free space" in done.stderr
    assert "Traceback" not in done.stderr and "tokenizer started" not in done.stdout + done.stderr


def test_disk_that_fills_up_during_a_job_is_reported_at_the_end(tmp_path: Path):
    done = run_on_small_disk(tmp_path / "disk", FILL_WHEN_IT_RUNS)
    assert done.returncode == 1, done.stderr
    assert "tokenizer failed" in done.stderr, done.stderr
    assert done.stderr.count(MESSAGE.format(folder=tmp_path / "disk/results")) == 1, done.stderr
    assert "0 bytes (0.00 GiB) are free" in done.stderr and "Traceback" not in done.stderr


def test_disk_with_free_space_is_not_mentioned(tmp_path: Path):
    done = run_on_small_disk(tmp_path / "disk", "")
    assert done.returncode == 0 and "free space" not in done.stderr, done.stderr


def test_limit_on_file_size_is_reported_and_nothing_else_is_needed_after_it_is_lifted(tmp_path: Path):
    chain = PipelineRun(tmp_path / "limited", tiny_config())
    command = ["prlimit", "--fsize=262144", *chain.command("-n", "results/tiny/tokenizer.json")]
    done = subprocess.run(
        command, cwd=chain.folder, capture_output=True, text=True, env=chain.environment(), check=False
    )
    assert done.returncode == 2, done.stderr
    assert "bytes to" in done.stderr and "File too large" in done.stderr and "ulimit -f" in done.stderr
    assert "Traceback" not in done.stderr
    assert chain.would_run()["tokenizer"] == 1
