"""Zstandard files that need much memory are refused with the right reason."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from longhaul.data.readers.read_documents import read_documents
from longhaul.errors import UserError
from tests.support.corpora import dataset

MAGIC = b"\x28\xb5\x2f\xfd"


@pytest.mark.parametrize(
    ("header", "mib"),
    [
        (b"\x00\x90", 256),  # window descriptor: exponent 18, mantissa 0
        (b"\x00\x89", 144),  # exponent 17, mantissa 1
        (b"\xa0\x01\x00\x00\x10", 256),  # single segment of 2^28 + 1 bytes
    ],
)
def test_a_large_window_is_refused(tmp_path: Path, header: bytes, mib: int):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(MAGIC + header + bytes(20))
    with pytest.raises(UserError, match=rf"a.jsonl.zst needs a window of {mib} MiB; files up to 128 MiB") as refused:
        list(read_documents([str(path)], dataset()))
    assert refused.value.hint.startswith("compress it again without zstd's --long and --ultra")
    path.write_bytes(pa.compress(b'{"text": "one"}\n', codec="zstd", asbytes=True))
    assert list(read_documents([str(path)], dataset()))


@pytest.mark.parametrize("size", [1, 300, 70_000])
def test_usual_frames_are_read(tmp_path: Path, size: int):
    text = "x" * size
    content = pa.compress(f'{{"text": "{text}"}}\n'.encode(), codec="zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    assert [document.content for document in read_documents([str(tmp_path / "a.jsonl.zst")], dataset())] == [text]


def test_another_damaged_file_keeps_its_message(tmp_path: Path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"no zstd")
    with pytest.raises(UserError, match="cannot read"):
        list(read_documents([str(tmp_path / "a.jsonl.zst")], dataset()))
