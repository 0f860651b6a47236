"""A job that fails for good: one attempt despite retries, its reason told last, and no second run that submits it unpatched."""

from __future__ import annotations

from pathlib import Path

from longhaul.artifacts.event_log import read_events
from tests.support.chain import Chain, tiny_config

TOKENIZER = "results/tiny/tokenizer.json"


def attempts(chain: Chain) -> int:
    events = read_events(chain.results / "jobs/tokenizer/history.jsonl")
    return sum(event["event"] in ("running", "restarted") for event in events)


def test_it_is_tried_once_told_last_and_refused_at_once(tmp_path: Path):
    chain = Chain(tmp_path / "broken", tiny_config())
    prose = chain.folder / "prose.jsonl"
    whole = prose.read_text()
    prose.write_text(whole + "{half a row\n")
    first = chain.snakemake(TOKENIZER, "--retries", "3")
    assert first.returncode == 1 and attempts(chain) == 1, first.stderr
    assert "Trying to restart" not in first.stdout + first.stderr
    last = first.stderr.split("tokenizer failed (permanent):")
    assert len(last) == 2 and "prose.jsonl" in last[1] and "remedy:" in last[1], first.stderr
    assert len(last[1].splitlines()) < 12, "there is nothing after it"

    again = chain.snakemake(TOKENIZER, "--retries", "3")
    assert again.returncode == 2 and attempts(chain) == 1, again.stderr
    assert "tokenizer failed at" in again.stderr and "would only fail again" in again.stderr
    assert "Traceback" not in again.stderr and "Error in rule" not in again.stderr

    prose.write_text(whole)
    done = chain.snakemake(TOKENIZER)
    assert done.returncode == 0 and attempts(chain) == 2, done.stderr
    assert "failed (" not in done.stderr
