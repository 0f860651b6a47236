"""Killed jobs continue with the same bytes and leave no worker behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from longhaul.artifacts.atomic_files import file_sha256
from tests.support.corpora import dataset, make_shards, text, tokenize_job, write_jsonl
from tests.support.wait import wait_for_end


def hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of the files of finished chunks. The names of unfinished chunks start with a dot."""
    return {str(path.relative_to(folder)): file_sha256(path) for path in folder.glob("[!.]*/*")}


def wait_for_work(process: subprocess.Popen[bytes], root: Path, before: set[str]) -> None:
    """Wait until the process starts to write a chunk."""
    while process.poll() is None and {path.name for path in root.glob(".*")} <= before:
        time.sleep(0.005)


def test_a_job_that_is_killed_again_and_again_writes_the_same_bytes(
    tmp_path: Path, tokenizer_folder: Path, pytestconfig: pytest.Config
):
    """Each kill ends the job and its workers at a random moment. Then some finished chunks are deleted, so that work remains."""
    files = [write_jsonl(tmp_path / f"{n}.jsonl", "text", (text(n * 900 + i, 900) for i in range(700))) for n in (1, 2)]
    settings = dataset(chunk_mb=0.1, validation_fraction=0.1)
    whole = make_shards(tmp_path / "whole", tokenizer_folder, files, settings, workers=1)
    (tmp_path / "killed").mkdir()
    job = tokenize_job(tmp_path / "killed", tokenizer_folder, files, settings, workers=2)
    job.write(tmp_path / "job.json")
    generator, root, kept, interrupted = random.Random(5), Path(job.folder), 0, 0
    kills = 20 if pytestconfig.getoption("all") else 6
    for _ in range(kills):
        before = {path.name for path in root.glob(".*")}
        words = [sys.executable, "-m", "longhaul", "job", "run", "tokenize", str(tmp_path / "job.json")]
        process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
        wait_for_work(process, root, before)
        more = len(list(root.glob("*/record.json"))) + generator.randrange(6)
        while process.poll() is None and len(list(root.glob("*/record.json"))) < more:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        interrupted += any(root.glob(".*/chunk/*.bin"))
        for finished in root.glob("[!.]*"):
            if generator.random() < 0.5:
                shutil.rmtree(finished)
            else:
                kept += 1
        Path(job.out).unlink(missing_ok=True)
    manifest = make_shards(tmp_path / "killed", tokenizer_folder, files, settings, workers=2)
    assert kept and interrupted >= kills // 6, (
        f"the kills test little: {kept} chunks kept, {interrupted} kills while a chunk was written"
    )
    assert hashes(Path(manifest.path)) == hashes(Path(whole.path))
    assert (manifest.splits, manifest.hash, manifest.sources) == (whole.splits, whole.hash, whole.sources)


def test_workers_end_with_a_killed_job(tmp_path: Path, tokenizer_folder: Path):
    files = [write_jsonl(tmp_path / "a.jsonl", "text", (text(i, 900) for i in range(4000)))]
    job = tokenize_job(tmp_path, tokenizer_folder, files, dataset(chunk_mb=1), workers=2)
    job.write(tmp_path / "job.json")
    process = subprocess.Popen([sys.executable, "-m", "longhaul", "job", "run", "tokenize", str(tmp_path / "job.json")])
    wait_for_work(process, Path(job.folder), set())
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(workers) >= 2
    wait_for_end(workers)
