"""A job with a permanent failure: one attempt despite retries, its cause printed last, and a second run refused."""

from __future__ import annotations

from pathlib import Path

from longhaul.artifacts.record_types import read_events
from tests.support.chain import Chain, tiny_config

TOKENIZER = "results/tiny/tokenizer.json"


def attempts(chain: Chain) -> int:
    events = read_events(chain.results / "jobs/tokenizer/history.jsonl")
    return sum(event["event"] in ("running", "restarted") for event in events)


def test_permanent_failure_is_attempted_once_printed_last_and_then_refused(tmp_path: Path):
    chain = Chain(tmp_path / "broken", tiny_config())
    prose = chain.folder / "prose.jsonl"
    valid = prose.read_text()
    prose.write_text(valid + "{half a row\n")
    first = chain.snakemake(TOKENIZER, "--retries", "3")
    assert first.returncode == 1 and attempts(chain) == 1, first.stderr
    assert "is tried again" not in first.stdout + first.stderr
    printed = first.stderr.split("tokenizer failed (permanent):")
    assert len(printed) == 2 and "prose.jsonl" in printed[1] and "remedy:" in printed[1], first.stderr
    assert len(printed[1].splitlines()) < 12, "nothing is printed after it"
    assert first.stderr.count("tokenizer failed; log: ") == 1, "Snakemake's own messages about it are not shown"

    again = chain.snakemake(TOKENIZER, "--retries", "3")
    assert again.returncode == 2 and attempts(chain) == 1, again.stderr
    assert "tokenizer failed at" in again.stderr and "would only fail again" in again.stderr
    assert "Traceback" not in again.stderr and "tokenizer started" not in again.stderr

    prose.write_text(valid)
    done = chain.snakemake(TOKENIZER)
    assert done.returncode == 0 and attempts(chain) == 2, done.stderr
    assert "failed (" not in done.stderr
