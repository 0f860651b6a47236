"""A link is replaced at once, and nothing else is replaced by one. What is no file is neither read nor written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.atomic_files import read_json, replace_link, writable_file
from longhaul.errors import UserError


def test_link_replaces_a_link_and_nothing_else(tmp_path: Path):
    link = tmp_path / "latest"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    replace_link(link, "a")
    replace_link(link, "b")
    assert link.resolve() == tmp_path / "b" and sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "latest"]
    link.unlink()
    link.mkdir()
    with pytest.raises(UserError, match="is not a link") as failed:
        replace_link(link, "a")
    assert "move it away" in failed.value.hint
    link.rename(tmp_path / "away")
    replace_link(link, "a")
    assert link.resolve() == tmp_path / "a"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


UNREADABLE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "missing": (_remove, "does not exist", "name another file, or run what writes it: longhaul run CONFIG"),
    "folder": (Path.mkdir, "is a folder, not a file", "give the path of a file"),
    "pipe": (os.mkfifo, "is a pipe or a device", "give the path of a file"),
    "loop of links": (
        lambda path: path.symlink_to(path),
        "cannot be read: Too many",
        "make it a file that you can read",
    ),
}


@pytest.mark.parametrize(("make", "message", "remedy"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_refused_until_it_is_a_file(
    make: Callable[[Path], Any], message: str, remedy: str, tmp_path: Path
):
    path = tmp_path / "a.json"
    make(path)
    with pytest.raises(UserError, match=message) as refused:
        read_json(path)
    assert refused.value.hint == remedy
    _remove(path)
    path.write_text("{}")
    assert read_json(path) == {}


@pytest.mark.parametrize(
    ("make", "message", "remedy"),
    [
        (lambda path: path.mkdir(), "is a folder, a pipe or a device", "name a file"),
        (lambda path: path.parent.touch(), "cannot write", "name a file in a folder of your own"),
    ],
    ids=["a folder", "below a file"],
)
def test_no_file_is_written_there_until_another_is_named(
    make: Callable[[Path], Any], message: str, remedy: str, tmp_path: Path
):
    path = tmp_path / "out" / "plan.json" if "write" in message else tmp_path / "plan.json"
    make(path)
    with pytest.raises(UserError, match=message) as refused:
        writable_file(path)
    assert refused.value.hint == remedy
    assert writable_file(tmp_path / "own" / "plan.json")
