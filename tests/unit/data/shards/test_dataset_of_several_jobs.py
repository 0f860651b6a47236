"""Several jobs that share a dataset write the same bytes as one job, for any number of partitions and after failures."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import DataManifest, EncodedPartition
from longhaul.data.filters.chunk_fingerprints import KEYS_FILE
from longhaul.data.shards import tokenize_dataset
from longhaul.data.shards.write_chunk import RECORD
from longhaul.data.tokenizers import choose_encoder
from longhaul.errors import UserError
from longhaul.jobs.kinds.tokenize_jobs import EncodeSpec, TokenizeSpec
from tests.support.corpora import dataset, make_shards, text, tokenize_job, write_jsonl
from tests.unit.data.filters.test_filter_documents import long_text, one_word_changed
from tests.unit.data.shards.test_worker_pool import hashes, wait_for_work
from tests.unit.data.tokenizers.test_choose_encoder import break_fast_encoder

SETTINGS: dict[str, Any] = {"chunk_mb": 0.02, "validation_fraction": 0.1}


def files_of(folder: Path, numbers: Sequence[int] = (1, 2, 3)) -> list[Path]:
    return [write_jsonl(folder / f"{n}.jsonl", "text", (text(n * 900 + i) for i in range(200))) for n in numbers]


def partition_jobs(job: TokenizeSpec, partitions: int) -> tuple[TokenizeSpec, list[EncodeSpec], TokenizeSpec]:
    """Return the jobs of a dataset, in order: index sources, encode …, tokenize_dataset."""
    folder = Path(job.out).parent
    index = job.model_copy(update={"out": str(folder / "sources.json")})
    last = job.model_copy(update={"source_index": index.out})
    encode = [
        {**dict(last), "partition": number, "partitions": partitions, "out": str(folder / f"{number}.json")}
        for number in range(1, partitions + 1)
    ]
    return index, [EncodeSpec.model_validate(spec) for spec in encode], last


def run(job: TokenizeSpec, partitions: int, before_last: Callable[[], object] = lambda: None) -> DataManifest:
    """Run all jobs, one after another; call `before_last` before the last one."""
    index, encode, last = partition_jobs(job, partitions)
    tokenize_dataset.index_sources(index)
    for one in encode:
        tokenize_dataset.encode(one)
    before_last()
    tokenize_dataset.run(last)
    return DataManifest.read(Path(job.out))


def contents(manifest: DataManifest) -> tuple[Any, ...]:
    return (
        manifest.splits,
        manifest.hash,
        manifest.sources,
        manifest.skipped,
        manifest.unigram_entropy_nats,
        manifest.encoder,
    )


def modified(root: Path, pattern: str = f"*/{RECORD}") -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.glob(pattern)}


@pytest.mark.parametrize("partitions", [2, 3])
def test_the_number_of_partitions_does_not_change_the_bytes(tmp_path: Path, tokenizer_folder: Path, partitions: int):
    files = files_of(tmp_path)
    alone = make_shards(tmp_path / "alone", tokenizer_folder, files, dataset(**SETTINGS))
    job = tokenize_job(tmp_path / "shared", tokenizer_folder, files, dataset(**SETTINGS))
    before: dict[Path, int] = {}
    manifest = run(job, partitions, lambda: before.update(modified(Path(job.folder))))
    assert contents(manifest) == contents(alone) and hashes(Path(manifest.path)) == hashes(Path(alone.path))
    assert modified(Path(job.folder)) == before, "the last job encoded something"
    chunks = [EncodedPartition.read(Path(one.out)).chunks for one in partition_jobs(job, partitions)[1]]
    assert all(chunks) and sorted(itertools.chain(*chunks)) == sorted(path.parent.name for path in before)


def test_jobs_with_several_workers_write_the_same(tmp_path: Path, tokenizer_folder: Path):
    files = [write_jsonl(tmp_path / f"{n}.jsonl", "text", (text(n, 900) for _ in range(1200))) for n in (1, 2)]
    assert all(file.stat().st_size > 4_000_000 for file in files), "enough for two workers per partition"
    settings = dataset(chunk_mb=1, validation_fraction=0.1)
    alone = make_shards(tmp_path / "alone", tokenizer_folder, files, settings)
    job = tokenize_job(tmp_path / "shared", tokenizer_folder, files, settings)
    manifest = run(job.model_copy(update={"workers": 2}), 2)
    assert contents(manifest) == contents(alone)


def test_another_number_of_partitions_keeps_existing_chunks(tmp_path: Path, tokenizer_folder: Path):
    """One of two jobs is killed and the other never starts. Then three jobs continue."""
    files = [write_jsonl(tmp_path / f"{n}.jsonl", "text", (text(n * 900 + i, 900) for i in range(700))) for n in (1, 2)]
    settings = dataset(chunk_mb=0.1, validation_fraction=0.1)
    whole = make_shards(tmp_path / "whole", tokenizer_folder, files, settings)
    job = tokenize_job(tmp_path / "killed", tokenizer_folder, files, settings)
    index, (first, _), _ = partition_jobs(job, 2)
    tokenize_dataset.index_sources(index)
    first.write(tmp_path / "job.json")
    words = [sys.executable, "-m", "longhaul", "job", "run", "encode", str(tmp_path / "job.json")]
    process, root = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL), Path(job.folder)
    while len(modified(root)) < 4:
        wait_for_work(process, root, set())
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not Path(first.out).exists()
    kept = modified(root)
    manifest = run(job, 3)
    assert modified(root).items() >= kept.items() and len(modified(root)) > len(kept)
    assert contents(manifest) == contents(whole) and hashes(root) == hashes(Path(whole.path))


def test_only_a_new_file_is_encoded(tmp_path: Path, tokenizer_folder: Path):
    files = files_of(tmp_path)
    job = tokenize_job(tmp_path, tokenizer_folder, files[:2], dataset(**SETTINGS))
    run(job, 2)
    kept = modified(Path(job.folder))
    more = tokenize_job(tmp_path, tokenizer_folder, files, dataset(**SETTINGS))
    manifest = run(more, 3)
    assert modified(Path(job.folder)).items() >= kept.items()
    assert [source["documents"] for source in manifest.sources] == [200, 200, 200]


def test_the_last_job_encodes_a_missing_partition(tmp_path: Path, tokenizer_folder: Path):
    files = files_of(tmp_path)
    alone = make_shards(tmp_path / "alone", tokenizer_folder, files, dataset(**SETTINGS))
    index, encode, last = partition_jobs(tokenize_job(tmp_path / "s", tokenizer_folder, files, dataset(**SETTINGS)), 2)
    tokenize_dataset.index_sources(index)
    tokenize_dataset.encode(encode[1])
    tokenize_dataset.run(last)
    assert contents(DataManifest.read(Path(last.out))) == contents(alone)


@pytest.mark.parametrize("rejecting", [0, 1, 2])
def test_a_difference_in_one_partition_rejects_the_fast_encoder_for_all(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, rejecting: int
):
    """Partitions that the fast encoder encoded before are not used."""
    files = files_of(tmp_path)
    expected = make_shards(tmp_path / "honest", tokenizer_folder, files, dataset(**SETTINGS))
    monkeypatch.setattr(choose_encoder, "_stress_texts", lambda folder: [])
    monkeypatch.setattr("longhaul.data.shards.source_index._sample_texts", lambda *arguments: [])
    monkeypatch.setattr("longhaul.data.tokenizers.document_encoder._EXCERPTS_PER_BATCH", 1000)
    job = tokenize_job(tmp_path / "shared", tokenizer_folder, files, dataset(**SETTINGS))
    index, encode, last = partition_jobs(job, 3)
    tokenize_dataset.index_sources(index)
    for number, one in enumerate(encode):
        with monkeypatch.context() as patch:
            if number == rejecting:
                break_fast_encoder(patch, "Document ")
            tokenize_dataset.encode(one)
    names = [EncodedPartition.read(Path(one.out)).encoder["name"] for one in encode]
    assert names == ["gigatoken"] * rejecting + ["tokenizers"] * (3 - rejecting)
    tokenize_dataset.run(last)
    manifest = DataManifest.read(Path(job.out))
    assert (
        manifest.encoder["name"] == "tokenizers"
        and "gigatoken and tokenizers give different ids" in manifest.encoder["reason"]
    )
    for split in expected.splits:
        assert [s["sha256"] for s in manifest.splits[split]["shards"]] == [
            s["sha256"] for s in expected.splits[split]["shards"]
        ]
    assert contents(run(job, 2)) == contents(manifest), "the rejection is kept"


def test_each_job_fingerprints_its_partition(tmp_path: Path, tokenizer_folder: Path):
    texts = [one_word_changed(long_text(i % 70)) if i % 3 else long_text(i % 70) for i in range(210)]
    files = [write_jsonl(tmp_path / "a.jsonl", "text", texts)]
    evaluation = [write_jsonl(tmp_path / "e.jsonl", "question", [long_text(5)])]
    against = {"files": ("e.jsonl",), "columns": ("question",)}
    settings = dataset(**SETTINGS, deduplicate="near", decontaminate=against)
    alone = make_shards(tmp_path / "alone", tokenizer_folder, files, settings, evaluation=evaluation)
    job = tokenize_job(tmp_path / "shared", tokenizer_folder, files, settings, evaluation=evaluation)
    fingerprinted: dict[Path, int] = {}
    manifest = run(job, 3, lambda: fingerprinted.update(modified(Path(job.folder), f"*.fingerprints/{KEYS_FILE}")))
    assert contents(manifest) == contents(alone) and {"near duplicate", "contaminated"} <= set(manifest.skipped)
    assert len(fingerprinted) > 3 and modified(Path(job.folder), f"*.fingerprints/{KEYS_FILE}") == fingerprinted


def test_a_touched_source_is_accepted_and_a_changed_one_is_indexed_again(tmp_path: Path, tokenizer_folder: Path):
    files = files_of(tmp_path)
    index, (first, second), last = partition_jobs(
        tokenize_job(tmp_path, tokenizer_folder, files, dataset(**SETTINGS)), 2
    )
    tokenize_dataset.index_sources(index)
    tokenize_dataset.encode(first)
    os.utime(files[1], (1, 1))
    tokenize_dataset.encode(second)
    files[1].write_text(files[1].read_text().replace("ship", "boat"))
    with pytest.raises(UserError, match=r"2.jsonl changed after the dataset's sources were indexed"):
        tokenize_dataset.run(last)
    assert not Path(last.out).exists()
    tokenize_dataset.index_sources(index)
    tokenize_dataset.run(last)
    assert Path(last.out).exists()


def test_a_source_index_of_other_files_is_refused(tmp_path: Path, tokenizer_folder: Path):
    files = files_of(tmp_path)
    index, *_ = partition_jobs(tokenize_job(tmp_path, tokenizer_folder, files[:2], dataset(**SETTINGS)), 2)
    tokenize_dataset.index_sources(index)
    _, (one, _), _ = partition_jobs(tokenize_job(tmp_path, tokenizer_folder, files, dataset(**SETTINGS)), 2)
    with pytest.raises(UserError, match=r"sources.json belongs to other files"):
        tokenize_dataset.encode(one)
