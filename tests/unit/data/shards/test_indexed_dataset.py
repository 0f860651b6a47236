"""Shards have Megatron-LM's bytes, keep every token, and damage is reported with the file."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longhaul.artifacts.atomic_files import file_sha256
from longhaul.data.shards.indexed_dataset import token_dtype
from longhaul.data.shards.shard_reader import ShardReader, SplitReader
from longhaul.data.shards.shard_writer import SplitWriter
from longhaul.errors import UserError
from tests.support.pipeline_run import REPOSITORY

LENGTHS = [3, 1, 5, 2]


def write(folder: Path, lengths: list[int], dtype: str = "uint16", max_bytes: int = 1 << 20) -> dict[str, Any]:
    """Write documents of these lengths with tokens 0, 1, 2, …, in two calls of add; every third token is a loss token."""
    writer = SplitWriter(folder, "train", dtype, with_mask=True, max_bytes=max_bytes)
    tokens = np.arange(sum(lengths))
    mask = (tokens % 3 == 0).astype(np.uint8)
    middle = sum(lengths[: len(lengths) // 2])
    for part, positions in (
        (lengths[: len(lengths) // 2], slice(0, middle)),
        (lengths[len(lengths) // 2 :], slice(middle, None)),
    ):
        writer.add(tokens[positions], np.array(part, dtype=np.int32), mask[positions])
    return writer.close()


@pytest.mark.parametrize(("dtype", "code", "size"), [("uint16", 8, 2), ("int32", 4, 4)])
def test_files_have_megatrons_layout(tmp_path: Path, dtype: str, code: int, size: int):
    """Layout of megatron/core/datasets/indexed_dataset.py, _IndexWriter, read here with struct only."""
    entry = write(tmp_path, LENGTHS, dtype)
    index = (tmp_path / "train-00000.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<QBQQ", index, 9) == (1, code, 4, 5)
    offset = 9 + struct.calcsize("<QBQQ")
    assert struct.unpack_from("<4i", index, offset) == (3, 1, 5, 2)
    assert struct.unpack_from("<4q", index, offset + 16) == (0, 3 * size, 4 * size, 9 * size)
    assert struct.unpack_from("<5q", index, offset + 48) == (0, 1, 2, 3, 4)
    assert len(index) == offset + 88
    assert np.frombuffer((tmp_path / "train-00000.bin").read_bytes(), dtype).tolist() == list(range(11))
    (shard,) = entry["shards"]
    assert shard["sha256"] == {name: file_sha256(tmp_path / f"train-00000.{name}") for name in ("bin", "idx", "mask")}
    assert (entry["tokens"], entry["documents"], entry["loss_tokens"]) == (11, 4, 4)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_reads_the_shards_and_writes_the_same_bytes(tmp_path: Path, dtype: str):
    lengths = [1 + number * 7 % 90 for number in range(300)]
    write(tmp_path, lengths, dtype)
    ours, theirs = tmp_path / "train-00000", tmp_path / "megatron"
    script = REPOSITORY / "tests" / "support" / "megatron_files.py"
    words = [sys.executable, "-W", "ignore", str(script), str(ours), str(theirs)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = np.cumsum(lengths).tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == [
        list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)
    ]
    for ending in (".bin", ".idx"):
        assert ours.with_suffix(ending).read_bytes() == theirs.with_suffix(ending).read_bytes()


def test_token_types_are_megatrons():
    sizes = (300, 65499, 65500, 129280, 2**31)
    assert [token_dtype(size) for size in sizes] == ["uint16", "uint16", "int32", "int32", "int32"]
    with pytest.raises(UserError, match="ids reach 2147483648; shards hold ids up to 2147483647"):
        token_dtype(2**31 + 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=40), st.integers(2, 100))
def test_every_token_is_kept_for_any_shard_size(lengths: list[int], max_bytes: int):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entry = write(folder, lengths, max_bytes=max_bytes)
        reader = SplitReader(folder, entry, with_mask=True)
        assert reader.lengths().tolist() == lengths
        assert reader.tokens(0, reader.token_count).tolist() == list(range(sum(lengths)))
        start = 0
        for number, length in enumerate(lengths):
            tokens, mask = reader.document(number)
            assert tokens.tolist() == list(range(start, start + length))
            assert mask.tolist() == [int(token % 3 == 0) for token in range(start, start + length)]
            start += length
        for shard in entry["shards"]:
            assert shard["tokens"] * 2 <= max_bytes or shard["documents"] == 1


def test_any_range_of_the_stream_is_read_across_shards(tmp_path: Path):
    reader = SplitReader(tmp_path, write(tmp_path, [4] * 6, max_bytes=16), with_mask=True)
    assert all(reader.tokens(a, b).tolist() == list(range(a, b)) for a in range(24) for b in range(a, 25))


DAMAGE = {
    "no token file": ("bin", lambda path: path.unlink(), "No such file"),
    "truncated tokens": (
        "bin",
        lambda path: path.write_bytes(path.read_bytes()[:-2]),
        "10 tokens, but its index has 11",
    ),
    "truncated mask": (
        "mask",
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "10 tokens, but its index has 11",
    ),
    "truncated index": ("idx", lambda path: path.write_bytes(path.read_bytes()[:-8]), "do not fit 4 documents"),
    "negative length": (
        "idx",
        lambda path: path.write_bytes(path.read_bytes()[:34] + struct.pack("<i", -3) + path.read_bytes()[38:]),
        "document 0 has -3 tokens",
    ),
    "another offset": (
        "idx",
        lambda path: path.write_bytes(path.read_bytes()[:58] + struct.pack("<q", 8) + path.read_bytes()[66:]),
        "document 1 starts at byte 8, but the documents before it end at 6",
    ),
    "half a header": ("idx", lambda path: path.write_bytes(path.read_bytes()[:20]), "too short"),
    "another format": ("idx", lambda path: path.write_bytes(b"x" * 200), "not a Megatron-LM index"),
    "empty index": ("idx", lambda path: path.write_bytes(b""), "empty file"),
}


@pytest.mark.parametrize(("suffix", "damage", "expected"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_reported_with_the_file(tmp_path: Path, suffix: str, damage: Any, expected: str):
    write(tmp_path, LENGTHS)
    damage(tmp_path / f"train-00000.{suffix}")
    with pytest.raises(UserError, match=expected) as refused:
        ShardReader(tmp_path / "train-00000", with_mask=True)
    assert f"train-00000.{suffix}" in refused.value.message and refused.value.hint.endswith("; then run again")


@pytest.mark.parametrize(("name", "stated"), [("documents", 5), ("documents", 3), ("tokens", 12)])
def test_a_shard_with_other_counts_than_the_manifest_is_refused(tmp_path: Path, name: str, stated: int):
    entry: Any = write(tmp_path, LENGTHS)
    found = entry["shards"][0][name]
    entry["shards"][0][name] = stated
    with pytest.raises(UserError, match=f"{found} {name}, but the manifest states {stated}"):
        SplitReader(tmp_path, entry, with_mask=True).document(0)
