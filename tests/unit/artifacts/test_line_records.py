"""The first and the last records of a long file are read without the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typing_extensions import TypedDict

from longhaul.artifacts import line_records
from longhaul.artifacts.line_records import read_first_records, read_last_records
from longhaul.errors import UserError


class Row(TypedDict):
    number: int


def write_rows(path: Path, count: int, end: str = "\n") -> Path:
    path.write_text("\n".join(json.dumps({"number": number}) for number in range(count)) + end)
    return path


def numbers(rows: list[Row]) -> list[int]:
    return [row["number"] for row in rows]


@pytest.mark.parametrize("end", ["\n", "", "\n\n", '\n{"numb'], ids=["whole", "no line break", "empty line", "torn"])
def test_last_records_come_in_their_order(tmp_path: Path, end: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 30, end)
    assert numbers(read_last_records(path, Row, 3)) == [27, 28, 29]
    assert numbers(read_last_records(path, Row, 99)) == list(range(30))
    assert numbers(read_last_records(path, Row, 2, containing=b" 1")) == [18, 19]
    assert read_last_records(path, Row, 2, containing=b"absent") == []


def test_first_records_skip_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"number": 1}\nnoise\n{"number": "x"}\n{"number": 2}\n{"number": 3}\n')
    assert numbers(read_first_records(path, Row, 2)) == [1, 2]
    assert numbers(read_first_records(path, Row, 9)) == [1, 2, 3]


@pytest.mark.parametrize("text", ["", "\n"])
def test_file_without_records_has_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "empty.jsonl").write_text(text)
    for path in (tmp_path / "empty.jsonl", tmp_path / "missing.jsonl"):
        assert read_first_records(path, Row, 3) == read_last_records(path, Row, 3) == []


def test_only_a_part_of_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line of the last part, and the last line of the first part, may be cut."""
    monkeypatch.setattr(line_records, "_PART_BYTES", 100)
    path = write_rows(tmp_path / "rows.jsonl", 1000)
    assert numbers(read_first_records(path, Row, 99)) == [0, 1, 2, 3, 4, 5, 6]
    assert numbers(read_last_records(path, Row, 99, within_bytes=100)) == [994, 995, 996, 997, 998, 999]


def test_search_goes_back_until_enough_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_records, "_PART_BYTES", 100)
    path = write_rows(tmp_path / "rows.jsonl", 1000)
    assert read_last_records(path, Row, 1, b" 7}", within_bytes=100) == []
    assert numbers(read_last_records(path, Row, 1, b" 7}", within_bytes=2**20)) == [7]
    assert numbers(read_last_records(path, Row, 2, b"7}", within_bytes=2**20)) == [987, 997]
    assert read_last_records(path, Row, 1, b" 7}", within_bytes=10_000) == []
    assert numbers(read_last_records(path, Row, 10_000, within_bytes=2**20)) == list(range(1000))


def test_folder_in_place_of_a_file_is_named_until_it_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.mkdir()
    for read in (read_first_records, read_last_records):
        with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
            read(path, Row, 1)
    path.rmdir()
    path.touch()
    assert read_first_records(path, Row, 1) == read_last_records(path, Row, 1) == []
