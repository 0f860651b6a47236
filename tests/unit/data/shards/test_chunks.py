"""Chunks contain every line once wherever files are divided, and a new file changes only its own chunk."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longhaul.data.readers.read_documents import read_range
from longhaul.data.readers.rows_and_file_ranges import BadData
from longhaul.data.shards.chunks import SourceFile, divide_into_chunks
from tests.support.corpora import dataset, make_shards, text, write_jsonl

SMALL = dataset(chunk_mb=0.02)


def source(path: str, size: int, digest: str) -> SourceFile:
    return SourceFile(path, "jsonl", size, digest, 0)


def read_all(files: Sequence[Path], chunk_bytes: int) -> list[object]:
    """Divide files into chunks; return the contents of all documents, or error messages in their place."""
    sources = [SourceFile.from_file(str(file), "auto") for file in files]
    chunks = divide_into_chunks(sources, chunk_bytes, {})
    ranges = [source_range.file_range(sources) for chunk in chunks for source_range in chunk.ranges]
    return [
        found.message if isinstance(found, BadData) else found.content
        for file_range in ranges
        for found in read_range(file_range, SMALL)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=30), min_size=1, max_size=30),
    st.integers(1, 200),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_every_line_is_read_once_for_any_chunk_size(texts: list[str], chunk_bytes: int, line_break: str):
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "a.jsonl", "text", texts)
        path.write_bytes(path.read_bytes().replace(b"\n", line_break.encode()))
        assert read_all([path], chunk_bytes) == texts


@pytest.mark.parametrize("rows_per_group", [1, 3, 50])
def test_every_row_group_is_read_once(tmp_path: Path, rows_per_group: int):
    texts = [text(i) for i in range(50)]
    pyarrow.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=rows_per_group)
    assert read_all([tmp_path / "a.parquet"], 1500) == texts


def test_an_error_in_a_later_chunk_has_the_line_number_of_the_file(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", "text", (text(i) for i in range(40)))
    path.write_bytes(path.read_bytes() + b'{"text": 1}\n')
    (message,) = [str(found) for found in read_all([path], 1000) if "not a string" in str(found)]
    assert message.startswith(f"{path}:41: ")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=2, max_size=60), st.data())
def test_a_new_file_keeps_the_chunks_of_other_files(sizes: list[int], data: st.DataObject):
    sources = [source(f"{i}.jsonl", size, f"{random.Random(i).getrandbits(256):064x}") for i, size in enumerate(sizes)]
    position = data.draw(st.integers(0, len(sizes)))
    more = [*sources[:position], source("new.jsonl", 10, f"{1:064x}"), *sources[position:]]
    before, after = ({chunk.name for chunk in divide_into_chunks(files, 1000, {})} for files in (sources, more))
    # A group that ends because it is full may shift the groups after it, until one ends by the draw for its last file.
    assert len(before - after) <= 1 + sum(size < 1000 for size in sizes) // 4
    chunks = divide_into_chunks(more, 1000, {})
    covered = [(source_range.source, source_range.start) for chunk in chunks for source_range in chunk.ranges]
    assert covered == sorted(set(covered)) and {number for number, _ in covered} == set(range(len(more)))


def test_only_an_added_large_file_is_encoded(tmp_path: Path, tokenizer_folder: Path):
    files = [write_jsonl(tmp_path / f"{n}.jsonl", "text", (text(n * 900 + i) for i in range(200))) for n in (1, 3)]
    first = make_shards(tmp_path, tokenizer_folder, files, SMALL)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.bin")}
    files.insert(1, write_jsonl(tmp_path / "2.jsonl", "text", (text(9000 + i) for i in range(200))))
    second = make_shards(tmp_path, tokenizer_folder, files, SMALL)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    old, new = ({shard["prefix"] for shard in manifest.splits["train"]["shards"]} for manifest in (first, second))
    assert old < new and second.sources[1]["documents"] == 200
