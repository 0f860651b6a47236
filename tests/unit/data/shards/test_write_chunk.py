"""One worker writes each chunk; changed files and bad rows are reported; memory is limited."""

from __future__ import annotations

import gzip
import os
import re
import socket
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.artifacts.leases import process_start
from longhaul.data.shards.chunks import Chunk, SourceFile, divide_into_chunks
from longhaul.data.shards.progress_line import ProgressCounters
from longhaul.data.shards.write_chunk import RECORD, ChunkWriter, EncodingTask, remove_leftovers
from longhaul.data.tokenizers.token_rows import select_documents
from longhaul.errors import UserError
from tests.support.corpora import dataset, make_shards, text, write_jsonl


def test_temporary_folders_of_ended_processes_are_removed(tmp_path: Path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    mine = f".c-{host}-{os.getpid()}-{process_start(os.getpid())}-b"
    names = {f".c-{host}-{ended.pid}-9.ab-a": False, mine: True, f".c-{host}-{os.getpid()}-9.ab-c": False}
    names[".c-other-host-1-9.ab-d"] = True
    for name in names:
        (tmp_path / name / "chunk").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12))
def test_selected_documents_are_whole(documents: list[tuple[int, bool]]):
    lengths = np.array([length for length, _ in documents], np.int32)
    selected = np.array([is_selected for _, is_selected in documents], bool)
    values = np.arange(lengths.sum())
    assert select_documents(values, lengths, selected).tolist() == values[np.repeat(selected, lengths)].tolist()


def chunk_and_writer(folder: Path, tokenizer_folder: Path) -> tuple[Chunk, ChunkWriter]:
    path = folder / "a.jsonl"
    if not path.exists():
        write_jsonl(path, "text", (text(i) for i in range(50)))
    sources = [SourceFile.from_file(str(path), "auto")]
    tokenizer = TokenizerManifest.read(tokenizer_folder / "tokenizer.json")
    (folder / "data").mkdir(exist_ok=True)
    task = EncodingTask(folder / "data", dataset(), dict(enumerate(sources)), tokenizer, "gigatoken", 2**60)
    return divide_into_chunks(sources, 10**9, {})[0], ChunkWriter(task, ProgressCounters(get_context("spawn")))


def test_only_one_of_two_workers_writes_a_chunk(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second worker starts before the first one has finished, and its rename fails."""
    chunk, first = chunk_and_writer(tmp_path, tokenizer_folder)
    _, second = chunk_and_writer(tmp_path, tokenizer_folder)
    fill, written = second._fill, []

    def slow_fill(*arguments: Any) -> Any:
        first.write(chunk)
        written.append((tmp_path / "data" / chunk.name / RECORD).stat())
        return fill(*arguments)

    monkeypatch.setattr(second, "_fill", slow_fill)
    second.write(chunk)
    assert (tmp_path / "data" / chunk.name / RECORD).stat().st_ino == written[0].st_ino
    assert [path.name for path in (tmp_path / "data").iterdir()] == [chunk.name]


def test_a_foreign_folder_with_a_chunks_name_is_reported(tmp_path: Path, tokenizer_folder: Path):
    chunk, writer = chunk_and_writer(tmp_path, tokenizer_folder)
    (tmp_path / "data" / chunk.name / "notes").mkdir(parents=True)
    with pytest.raises(UserError, match=f"{chunk.name} exists without {RECORD}"):
        writer.write(chunk)


def test_a_source_that_is_removed_is_reported(tmp_path: Path, tokenizer_folder: Path):
    chunk, writer = chunk_and_writer(tmp_path, tokenizer_folder)
    (source,) = writer._task.sources.values()
    removed = Path(source.path).rename(tmp_path / "removed")
    with pytest.raises(UserError, match=r"a.jsonl does not exist"):
        writer.write(chunk)
    with pytest.raises(UserError, match=r"a.jsonl was removed while it was read\n  remedy: restore it, then run again"):
        source.require_unchanged()
    removed.rename(source.path)
    source.require_unchanged()
    writer.write(chunk)


def test_a_source_that_changes_is_refused_until_the_next_run(tmp_path: Path, tokenizer_folder: Path):
    chunk, writer = chunk_and_writer(tmp_path, tokenizer_folder)
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"a.jsonl changed while it was read \(\d+ bytes before, \d+ now\)"):
        writer.write(chunk)
    assert list((tmp_path / "data").iterdir()) == []
    chunk, writer = chunk_and_writer(tmp_path, tokenizer_folder)  # the next run
    writer.write(chunk)


def test_a_source_that_cannot_be_read_is_refused_until_it_can(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=f"cannot read {path}: No such file") as refused:
        SourceFile.from_file(str(path), "auto")
    assert refused.value.hint == "make it readable, or correct the dataset's `files`"
    path.write_text('{"text": "one"}\n')
    assert SourceFile.from_file(str(path), "auto")


BAD_LINES = (
    b'{"text": "one"}\nnonsense\n{"text": null}\n{"body": 1}\n{"text": "\xff"}\n{"text": "'
    + b"x" * 2000
    + b'"}\n{"text": "two"}'
)


def test_bad_rows_are_left_out_counted_and_printed_with_bad_rows_skip(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.jsonl").write_bytes(BAD_LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(BAD_LINES * 50)[:-30])
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "d.jsonl").write_bytes(b"\n\n")
    settings = dataset(bad_rows="skip", max_document_mb=0.001)
    manifest = make_shards(tmp_path, tokenizer_folder, sorted(tmp_path.glob("?.jsonl*")), settings)
    (gzip_documents,) = [source["documents"] for source in manifest.sources if source["path"].endswith("gz")]
    assert manifest.splits["train"]["documents"] + manifest.splits["validation"]["documents"] == 2 + gzip_documents
    assert manifest.skipped["damaged file"] == manifest.skipped["empty file"] == manifest.skipped["no documents"] == 1
    assert set(manifest.skipped) == {
        "not valid JSON",
        "null text",
        "missing column",
        "invalid UTF-8",
        "too long",
        "damaged file",
        "empty file",
        "no documents",
    }
    printed = capsys.readouterr().err
    assert re.search(r"b.jsonl.gz after line \d+: .*; the rest of the file is not read", printed)
    assert "a.jsonl:2: not valid JSON" in printed and "a.jsonl:6: longer than 0.001 MB" in printed


def test_a_line_that_is_too_long_stops_the_job_by_default(tmp_path: Path, tokenizer_folder: Path):
    write_jsonl(tmp_path / "a.jsonl", "text", ["short", "x" * 5000, "short"])
    with pytest.raises(UserError, match=r"a.jsonl:2: longer than 0.001 MB, the dataset's max_document_mb"):
        make_shards(tmp_path, tokenizer_folder, [tmp_path / "a.jsonl"], dataset(max_document_mb=0.001))
