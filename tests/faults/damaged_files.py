"""Damages files of a run, as bad disks, killed processes and attackers do, and follows the remedies that longhaul prints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.faults.faulted_run import TRAIN, FaultedRun
from tests.support.unpickling_payloads import put_payload_in_checkpoint

RECORDS = ("history.jsonl", "attempts.jsonl", "events.jsonl", "metrics.jsonl")


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))


def newest_checkpoint(run: FaultedRun) -> Path:
    return max(run.in_weights("checkpoints/step-????????"))


def damage_newest_checkpoint(run: FaultedRun) -> None:
    """Damage the largest file of the newest checkpoint."""
    flip_bit(max(newest_checkpoint(run).glob("*.pt"), key=lambda path: path.stat().st_size))


def put_payload_in_newest_checkpoint(run: FaultedRun) -> None:
    """Put a command into every pickle of the newest checkpoint, and adjust the hashes of its manifest."""
    assert put_payload_in_checkpoint(newest_checkpoint(run), run.folder / "payload-ran")


def move_newest_checkpoint_away(run: FaultedRun) -> None:
    assert not (run.folder / "payload-ran").exists()
    newest = newest_checkpoint(run)
    assert newest.name in run.failure(TRAIN)["cause"]
    shutil.move(newest, run.folder / "moved-away")


def damage_token_shard(run: FaultedRun) -> None:
    flip_bit(next(run.results.glob("data/prose/*/train*.bin")))


def damage_tokenizer(run: FaultedRun) -> None:
    flip_bit(next(run.results.glob("tokenizers/*/tokenizer.json")))


def run_remedy(job: str) -> Callable[[FaultedRun], None]:
    """Return a function that runs the command of a job's remedy, in the run's working folder."""

    def follow(run: FaultedRun) -> None:
        command = re.search(r"rm (-r )?[^;]*", run.failure(job)["remedy"])
        assert command
        subprocess.run(command[0], shell=True, check=True, cwd=run.folder)

    return follow


def tear_records(run: FaultedRun) -> None:
    """Leave half of a line at the end of every file of records, as a process that is killed while it writes does."""
    paths = [path for name in RECORDS for path in (*run.in_weights(name), run.results / TRAIN / name) if path.exists()]
    assert {path.name for path in paths} == {*RECORDS}
    for path in paths:
        last = path.read_bytes().splitlines()[-1]
        with path.open("ab") as stream:
            stream.write(last[: len(last) // 2])
