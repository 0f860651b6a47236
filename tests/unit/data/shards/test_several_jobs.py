"""Several jobs on one dataset: the same bytes as one job's, whatever their number, and whatever one of them meets."""

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

from longhaul.artifacts.schemas import DataManifest, EncodedPartition
from longhaul.data.filters.fingerprints import KEYS
from longhaul.data.shards import tokenize_dataset as tokenize
from longhaul.data.shards.write_chunk import RECORD
from longhaul.data.tokenizers import choose_encoder as choice
from longhaul.errors import UserError
from longhaul.jobs.specs import EncodeSpec, TokenizeSpec
from tests.support.corpora import dataset, make_shards, text, tokenize_job, write_jsonl
from tests.unit.data.filters.test_drop_documents import long_text, one_word_changed
from tests.unit.data.shards.test_chunks import hashes, wait_for_work
from tests.unit.data.tokenizers.test_encoders import off_by_one

SETTINGS: dict[str, Any] = {"chunk_mb": 0.02, "validation_fraction": 0.1}


def files_of(folder: Path, numbers: Sequence[int] = (1, 2, 3)) -> list[Path]:
    return [write_jsonl(folder / f"{n}.jsonl", "text", (text(n * 900 + i) for i in range(200))) for n in numbers]


def shared(job: TokenizeSpec, shares: int) -> tuple[TokenizeSpec, list[EncodeSpec], TokenizeSpec]:
    """The jobs of a dataset, in their order: survey, encode …, tokenize."""
    folder = Path(job.out).parent
    survey = job.model_copy(update={"out": str(folder / "survey.json")})
    last = job.model_copy(update={"survey": survey.out})
    told = [
        {**dict(last), "share": n, "shares": shares, "out": str(folder / f"{n}.json")} for n in range(1, shares + 1)
    ]
    return survey, [EncodeSpec.model_validate(one) for one in told], last


def run(job: TokenizeSpec, shares: int, between: Callable[[], object] = lambda: None) -> DataManifest:
    """All of them, one after another; `between` is done before the last."""
    survey, encode, last = shared(job, shares)
    tokenize.survey(survey)
    for one in encode:
        tokenize.encode(one)
    between()
    tokenize.run(last)
    return DataManifest.read(Path(job.out))


def contents(made: DataManifest) -> tuple[Any, ...]:
    return made.splits, made.hash, made.sources, made.skipped, made.unigram_entropy_nats, made.encoder


def modified(root: Path, pattern: str = f"*/{RECORD}") -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.glob(pattern)}


@pytest.mark.parametrize("shares", [2, 3])
def test_the_number_of_jobs_changes_no_byte(tmp_path: Path, tokenizer_folder: Path, shares: int):
    files = files_of(tmp_path)
    alone = make_shards(tmp_path / "alone", tokenizer_folder, files, dataset(**SETTINGS))
    job = tokenize_job(tmp_path / "shared", tokenizer_folder, files, dataset(**SETTINGS))
    before: dict[Path, int] = {}
    made = run(job, shares, lambda: before.update(modified(Path(job.folder))))
    assert contents(made) == contents(alone) and hashes(Path(made.path)) == hashes(Path(alone.path))
    assert modified(Path(job.folder)) == before, "the last job encoded something"
    units = [EncodedPartition.read(Path(one.out)).units for one in shared(job, shares)[1]]
    assert all(units) and sorted(itertools.chain(*units)) == sorted(path.parent.name for path in before)


def test_jobs_with_pools_of_workers_make_the_same(tmp_path: Path, tokenizer_folder: Path):
    files = [write_jsonl(tmp_path / f"{n}.jsonl", "text", (text(n, 900) for _ in range(1200))) for n in (1, 2)]
    assert all(file.stat().st_size > 4_000_000 for file in files), "enough for two workers in each share"
    settings = dataset(chunk_mb=1, validation_fraction=0.1)
    alone = make_shards(tmp_path / "alone", tokenizer_folder, files, settings)
    job = tokenize_job(tmp_path / "shared", tokenizer_folder, files, settings)
    made = run(job.model_copy(update={"workers": 2}), 2)
    assert contents(made) == contents(alone)


def test_another_number_of_jobs_goes_on_with_what_is_there(tmp_path: Path, tokenizer_folder: Path):
    """One of two jobs is killed amid its share, the other never starts; then there are three."""
    files = [write_jsonl(tmp_path / f"{n}.jsonl", "text", (text(n * 900 + i, 900) for i in range(700))) for n in (1, 2)]
    settings = dataset(chunk_mb=0.1, validation_fraction=0.1)
    whole = make_shards(tmp_path / "whole", tokenizer_folder, files, settings)
    job = tokenize_job(tmp_path / "killed", tokenizer_folder, files, settings)
    survey, (first, _), _ = shared(job, 2)
    tokenize.survey(survey)
    first.write(tmp_path / "job.json")
    words = [sys.executable, "-m", "longhaul", "encode", str(tmp_path / "job.json")]
    process, root = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL), Path(job.folder)
    while len(modified(root)) < 4:
        wait_for_work(process, root, set())
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not Path(first.out).exists()
    kept = modified(root)
    made = run(job, 3)
    assert modified(root).items() >= kept.items() and len(modified(root)) > len(kept)
    assert contents(made) == contents(whole) and hashes(root) == hashes(Path(whole.path))


def test_a_new_file_is_encoded_alone(tmp_path: Path, tokenizer_folder: Path):
    files = files_of(tmp_path)
    job = tokenize_job(tmp_path, tokenizer_folder, files[:2], dataset(**SETTINGS))
    run(job, 2)
    kept = modified(Path(job.folder))
    more = tokenize_job(tmp_path, tokenizer_folder, files, dataset(**SETTINGS))
    made = run(more, 3)
    assert modified(Path(job.folder)).items() >= kept.items()
    assert [source["documents"] for source in made.sources] == [200, 200, 200]


def test_a_share_that_was_lost_is_made_by_the_last_job(tmp_path: Path, tokenizer_folder: Path):
    files = files_of(tmp_path)
    alone = make_shards(tmp_path / "alone", tokenizer_folder, files, dataset(**SETTINGS))
    survey, encode, last = shared(tokenize_job(tmp_path / "s", tokenizer_folder, files, dataset(**SETTINGS)), 2)
    tokenize.survey(survey)
    tokenize.encode(encode[1])
    tokenize.run(last)
    assert contents(DataManifest.read(Path(last.out))) == contents(alone)


@pytest.mark.parametrize("fallen", [0, 1, 2])
def test_a_difference_that_one_job_finds_holds_for_all(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, fallen: int
):
    """Whichever share the document is in: those that were encoded before by the fast encoder do not count."""
    files = files_of(tmp_path)
    honest = make_shards(tmp_path / "honest", tokenizer_folder, files, dataset(**SETTINGS))
    monkeypatch.setattr(choice, "_hard_texts", lambda folder: [])
    monkeypatch.setattr("longhaul.data.shards.source_index._sample", lambda *arguments: [])
    monkeypatch.setattr("longhaul.data.tokenizers.document_encoder._CHECKED_PER_BATCH", 1000)
    job = tokenize_job(tmp_path / "shared", tokenizer_folder, files, dataset(**SETTINGS))
    survey, encode, last = shared(job, 3)
    tokenize.survey(survey)
    for number, one in enumerate(encode):
        with monkeypatch.context() as patch:
            if number == fallen:
                off_by_one(patch, "Document ")
            tokenize.encode(one)
    names = [EncodedPartition.read(Path(one.out)).encoder["name"] for one in encode]
    assert names == ["gigatoken"] * fallen + ["tokenizers"] * (3 - fallen)
    tokenize.run(last)
    made = DataManifest.read(Path(job.out))
    assert made.encoder["name"] == "tokenizers" and "gigatoken gives other ids" in made.encoder["reason"]
    for split in honest.splits:
        assert [s["sha256"] for s in made.splits[split]["shards"]] == [
            s["sha256"] for s in honest.splits[split]["shards"]
        ]
    assert contents(run(job, 2)) == contents(made), "what was found out is not forgotten"


def test_alike_and_evaluation_texts_are_looked_up_by_each_job(tmp_path: Path, tokenizer_folder: Path):
    texts = [one_word_changed(long_text(i % 70)) if i % 3 else long_text(i % 70) for i in range(210)]
    files = [write_jsonl(tmp_path / "a.jsonl", "text", texts)]
    evaluation = [write_jsonl(tmp_path / "e.jsonl", "question", [long_text(5)])]
    against = {"files": ("e.jsonl",), "columns": ("question",)}
    settings = dataset(**SETTINGS, deduplicate="near", decontaminate=against)
    alone = make_shards(tmp_path / "alone", tokenizer_folder, files, settings, evaluation=evaluation)
    job = tokenize_job(tmp_path / "shared", tokenizer_folder, files, settings, evaluation=evaluation)
    scanned: dict[Path, int] = {}
    made = run(job, 3, lambda: scanned.update(modified(Path(job.folder), f"*.scan/{KEYS}")))
    assert contents(made) == contents(alone) and {"near duplicate", "contaminated"} <= set(made.skipped)
    assert len(scanned) > 3 and modified(Path(job.folder), f"*.scan/{KEYS}") == scanned


def test_a_source_that_was_touched_is_the_same_and_one_that_changed_is_refused(tmp_path: Path, tokenizer_folder: Path):
    files = files_of(tmp_path)
    survey, (first, second), last = shared(tokenize_job(tmp_path, tokenizer_folder, files, dataset(**SETTINGS)), 2)
    tokenize.survey(survey)
    tokenize.encode(first)
    os.utime(files[1], (1, 1))
    tokenize.encode(second)
    files[1].write_text(files[1].read_text().replace("ship", "boat"))
    with pytest.raises(UserError, match=r"2.jsonl changed since the dataset was surveyed"):
        tokenize.run(last)
    assert not Path(last.out).exists()


def test_a_survey_of_other_files_is_refused(tmp_path: Path, tokenizer_folder: Path):
    files = files_of(tmp_path)
    survey, *_ = shared(tokenize_job(tmp_path, tokenizer_folder, files[:2], dataset(**SETTINGS)), 2)
    tokenize.survey(survey)
    _, (one, _), _ = shared(tokenize_job(tmp_path, tokenizer_folder, files, dataset(**SETTINGS)), 2)
    with pytest.raises(UserError, match=r"survey.json is of other files"):
        tokenize.encode(one)
