"""Artifacts: written atomically, read only in their own kind and version, with equal hashes for equal values."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from longhaul.artifacts.artifact_schemas import Lock, TokenizerManifest
from longhaul.artifacts.atomic_files import (
    atomic_path,
    content_hash,
    disk_full_as_user_error,
    read_bytes,
    read_json,
    write_json,
    write_text,
)
from longhaul.artifacts.line_records import read_lines
from longhaul.errors import DiskFull, UserError


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(TypeError):
        write_json(path, {"a set": {1}})
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_file_mode_follows_the_umask(tmp_path: Path):
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_artifact_is_read_back_unchanged(tmp_path: Path):
    lock = Lock({"data": {"path": "/d", "files": ["é"]}}, {"model_type": "llama"})
    lock.write(tmp_path / "lock.json")
    assert Lock.read(tmp_path / "lock.json") == lock


WRONG = {
    "another kind": ({"artifact": "Export", "schema_version": 1}, "holds Export version 1, not Lock version 1"),
    "another version": ({"artifact": "Lock", "schema_version": 9}, "holds Lock version 9, not Lock version 1"),
    "no artifact": ([1], "holds None version None, not Lock version 1"),
    "an unknown key": ({"artifact": "Lock", "schema_version": 1, "b": 2}, "is not a complete Lock"),
}


@pytest.mark.parametrize(("value", "message"), WRONG.values(), ids=WRONG)
def test_artifact_of_another_release_is_refused_with_its_path(tmp_path: Path, value: object, message: str):
    path = tmp_path / "lock.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=message) as refused:
        Lock.read(path)
    assert str(path) in refused.value.message and "restore the file" in refused.value.hint


def test_artifact_without_a_field_is_refused(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"artifact": "TokenizerManifest", "schema_version": 1, "path": "a"}')
    with pytest.raises(UserError, match="is not a complete TokenizerManifest"):
        TokenizerManifest.read(path)


def test_missing_and_invalid_files_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"half\.json is not valid JSON"):
        read_json(tmp_path / "half.json")


def test_content_hash_does_not_depend_on_key_order():
    assert content_hash({"a": 1, "b": [1.5, None]}) == content_hash({"b": [1.5, None], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 1.5})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_the_one_that_is_written_to(number: int, tmp_path: Path):
    """A failed write does not name its file; other calls do, and that file may be on another disk."""
    for named, folder in ((None, tmp_path / "export"), (str(tmp_path / "other/file"), tmp_path / "other")):
        with (
            pytest.raises(
                DiskFull, match=f"^{named or 'an export'} needs 900 bytes .* of free space in {folder},"
            ) as full,
            disk_full_as_user_error("an export", tmp_path / "export", 900, "remove other exports"),
        ):
            raise OSError(number, "full", named)
        assert full.value.folder == folder and "remove other exports" in full.value.hint


def test_other_errors_of_the_system_stay(tmp_path: Path):
    with pytest.raises(PermissionError), disk_full_as_user_error("an export", tmp_path):
        raise PermissionError(errno.EACCES, "denied")


@pytest.mark.parametrize("read", [read_bytes, lambda path: list(read_lines(path, dict))])
def test_a_pipe_or_a_device_is_not_read(read: Callable[[Path], object], tmp_path: Path):
    """Neither ends."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="is a pipe or a device"):
            read(path)
