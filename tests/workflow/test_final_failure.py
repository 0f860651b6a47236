"""A job with a final failure: one attempt despite retries, its cause printed last. A second run is refused, or tries it once."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longhaul.artifacts.line_record_fields import read_events
from tests.support.pipeline_run import PipelineRun, tiny_config

TOKENIZER = "results/tiny/tokenizer.json"


def attempts(chain: PipelineRun) -> int:
    events = read_events(chain.results / "jobs/tokenizer/history.jsonl")
    return sum(event["event"] in ("running", "restarted") for event in events)


def test_permanent_failure_is_attempted_once_printed_last_and_then_refused(tmp_path: Path):
    chain = PipelineRun(tmp_path / "broken", tiny_config())
    prose = chain.folder / "prose.jsonl"
    valid = prose.read_text()
    prose.write_text(valid * 2 + "{half a row\n")  # the plan reads 100 rows
    first = chain.snakemake(TOKENIZER, "--retries", "3")
    assert first.returncode == 1 and attempts(chain) == 1, first.stderr
    assert "starts again" not in first.stdout + first.stderr
    printed = first.stderr.split("tokenizer failed (permanent):")
    assert len(printed) == 2 and "prose.jsonl" in printed[1] and "remedy:" in printed[1], first.stderr
    assert first.stderr.count("prose.jsonl") == first.stderr.count("remedy:") == 1, "one cause, one remedy"
    assert len(printed[1].splitlines()) < 12, "nothing is printed after it"
    assert first.stderr.count("tokenizer failed; log: ") == 1, "Snakemake's own messages about it are not shown"
    for noise in ("CalledProcessError", "Exiting because", "At least one job", "keep-incomplete"):
        assert noise not in first.stderr

    status = subprocess.run(
        [sys.executable, "-m", "longhaul", "status", "run.yaml", "--json"],
        cwd=chain.folder,
        env=chain.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    state = json.loads(status.stdout)
    job = next(job for job in state["jobs"] if job["name"] == "tokenizer")
    assert state["state"] == job["state"] == "failed"
    assert f"Run tiny: failed (0 of {len(state['jobs'])} jobs done)" in first.stderr
    assert "report.html is not renewed" not in first.stderr
    assert f"Report: {chain.results / 'report.html'}\n" in first.stderr
    report = html.unescape((chain.results / "report.html").read_text())
    assert f"tokenizer failed: {job['detail']}. Remedy: {job['remedy']}" in report and job["detail"] in printed[1]

    again = chain.snakemake(TOKENIZER, "--retries", "3")
    assert again.returncode == 2 and attempts(chain) == 1, again.stderr
    assert "tokenizer failed at" in again.stderr and "would only fail again" in again.stderr
    assert "Traceback" not in again.stderr and "tokenizer started" not in again.stderr

    prose.write_text(valid)
    done = chain.snakemake(TOKENIZER)
    assert done.returncode == 0 and attempts(chain) == 2, done.stderr
    assert "failed (" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount needs root")
def test_repaired_folder_needs_only_the_same_command(tmp_path: Path):
    """The folder is on a file system that is mounted read-only during the first run."""
    chain = PipelineRun(tmp_path / "sealed", tiny_config())
    sealed = chain.results / "tokenizers"
    sealed.mkdir(parents=True)
    seal = f'mount --bind {sealed} {sealed} && mount -o remount,bind,ro {sealed} && exec "$@"'
    command = ["unshare", "--mount", "bash", "-c", seal, "-", *chain.command(TOKENIZER, "--retries", "3")]
    first = subprocess.run(
        command, cwd=chain.folder, capture_output=True, text=True, env=chain.environment(), check=False
    )
    assert first.returncode == 1 and attempts(chain) == 1, first.stderr
    printed = first.stderr.split("tokenizer failed (environment):")[1]
    assert "Read-only file system" in printed and "then run the same command again" in printed, first.stderr
    done = chain.snakemake(TOKENIZER)
    assert done.returncode == 0 and attempts(chain) == 2, done.stderr
