"""Shards on disk: Megatron's bytes, nothing lost where shards are cut, damage named."""

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

from longhaul.artifacts.files import file_sha256
from longhaul.data.shards.indexed_dataset import ShardReader, SplitReader, SplitWriter, token_dtype
from longhaul.errors import UserError
from tests.support.chain import REPOSITORY

LENGTHS = [3, 1, 5, 2]


def write(folder: Path, lengths: list[int], dtype: str = "uint16", max_bytes: int = 1 << 20) -> dict[str, Any]:
    """Documents of these lengths with tokens 0, 1, 2, …; every third token is in the loss. In two calls of add."""
    writer = SplitWriter(folder, "train", dtype, with_mask=True, max_bytes=max_bytes)
    tokens = np.arange(sum(lengths))
    mask = (tokens % 3 == 0).astype(np.uint8)
    middle = sum(lengths[: len(lengths) // 2])
    for part, place in (
        (lengths[: len(lengths) // 2], slice(0, middle)),
        (lengths[len(lengths) // 2 :], slice(middle, None)),
    ):
        writer.add(tokens[place], np.array(part, dtype=np.int32), mask[place])
    return writer.close()


@pytest.mark.parametrize(("dtype", "code", "size"), [("uint16", 8, 2), ("int32", 4, 4)])
def test_the_bytes_are_megatrons(tmp_path: Path, dtype: str, code: int, size: int):
    """Layout of megatron/core/datasets/indexed_dataset.py, _IndexWriter: read here with struct alone."""
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
def test_megatrons_own_reader_reads_what_its_own_writer_would_have_written(tmp_path: Path, dtype: str):
    lengths = [1 + number * 7 % 90 for number in range(300)]
    write(tmp_path, lengths, dtype)
    ours, theirs = tmp_path / "train-00000", tmp_path / "theirs"
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


def test_types_change_where_megatrons_do():
    sizes = (300, 65499, 65500, 129280, 2**31)
    assert [token_dtype(size) for size in sizes] == ["uint16", "uint16", "int32", "int32", "int32"]
    with pytest.raises(UserError, match="ids reach 2147483648; shards hold ids up to 2147483647"):
        token_dtype(2**31 + 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=40), st.integers(2, 100))
def test_no_token_is_lost_wherever_shards_are_cut(lengths: list[int], max_bytes: int):
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


def test_any_stretch_of_the_stream_crosses_shards(tmp_path: Path):
    reader = SplitReader(tmp_path, write(tmp_path, [4] * 6, max_bytes=16), with_mask=True)
    assert all(reader.tokens(a, b).tolist() == list(range(a, b)) for a in range(24) for b in range(a, 25))


DAMAGE = {
    "no tokens": ("bin", lambda path: path.unlink(), "No such file"),
    "tokens cut short": ("bin", lambda path: path.write_bytes(path.read_bytes()[:-2]), "10 tokens, its index says 11"),
    "a mask cut short": ("mask", lambda path: path.write_bytes(path.read_bytes()[:-1]), "10 tokens, its index says 11"),
    "an index cut short": ("idx", lambda path: path.write_bytes(path.read_bytes()[:-8]), "do not fit 4 documents"),
    "half a header": ("idx", lambda path: path.write_bytes(path.read_bytes()[:20]), "too short"),
    "something else": ("idx", lambda path: path.write_bytes(b"x" * 200), "not a Megatron index"),
    "an empty index": ("idx", lambda path: path.write_bytes(b""), "empty file"),
}


@pytest.mark.parametrize(("ending", "damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(tmp_path: Path, ending: str, damage: Any, says: str):
    write(tmp_path, LENGTHS)
    damage(tmp_path / f"train-00000.{ending}")
    with pytest.raises(UserError, match=says) as refused:
        ShardReader(tmp_path / "train-00000", with_mask=True)
    assert f"train-00000.{ending}" in refused.value.message and "made anew" in refused.value.hint
