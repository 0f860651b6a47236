"""Chats that are too long for a later stage end a run before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.pipeline_run import PipelineRun, tiny_config


def test_chats_too_long_for_the_second_stage_end_the_run_before_the_first_one_trains(tmp_path: Path):
    """--keep-going starts every job that does not depend on a failed one."""
    chain = PipelineRun(tmp_path / "long", tiny_config())
    question = {"role": "user", "content": "How long is the haul? " * 40}
    chats = [{"messages": [question, {"role": "assistant", "content": f"{i} miles."}]} for i in range(20)]
    (chain.folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))

    first = chain.snakemake("--keep-going")
    assert first.returncode == 1, first.stdout + first.stderr
    printed = first.stderr.split("count_chats-chats failed (permanent):")[1]
    assert "stage chat: dataset chats: with truncate right, none of the " in printed, printed
    assert "has a loss token within sequence_length 64" in printed and "raise the stage's sequence_length" in printed
    assert (chain.results / "fabric.json").exists() and (chain.results / "data/prose.json").exists()
    assert not (chain.results / "stages/base/history.jsonl").exists(), "stage base has trained"

    again = chain.snakemake()
    assert again.returncode == 2 and "would only fail again" in again.stderr, again.stderr
    chain.config["stages"][1]["truncate"] = "left"
    chain.save()
    chain.run("results/tiny/data/chats.kept.json")
    kept = chain.read("data/chats.kept.json")["splits"]["train"]
    assert [(found["truncate"], found["cut_documents"] == found["documents"] > 0) for found in kept] == [("left", True)]
