"""The plan reads the first rows of data files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from longhaul.data.readers.first_rows import FirstRows, first_rows
from longhaul.errors import UserError
from tests.support.small_configs import plan_of

ANSWER = {"role": "assistant", "content": "A"}
CHATS = {"datasets.chats.python_stdlib": ..., "datasets.chats.files": ["chats*"]}


def write_rows(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_columns_and_message_keys_that_nothing_reads_are_named(tmp_path: Path):
    messages = [{"role": "user", "content": "Q", "name": "Ann", "weight": 0}, {**ANSWER, "weight": 1, "reasoning": "R"}]
    write_rows(tmp_path / "chats1.jsonl", {"id": 1, "messages": messages, "tools": []})
    write_rows(tmp_path / "chats2.jsonl", {"source": "x", "messages": [ANSWER]})
    assert first_rows(plan_of(tmp_path, CHATS), "chats") == FirstRows(
        ["id", "source"], ["user.name", "user.weight"], 2, 2
    )


def test_unread_keys_of_calls_and_text_parts_are_named(tmp_path: Path):
    parts = [{"type": "text", "text": "Q", "cache_control": {}, "citations": None}]
    call = {"id": "1", "function": {"name": "f", "arguments": {}, "strict": True}}
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "tool_calls": [call]}]
    write_rows(tmp_path / "chats1.jsonl", {"messages": messages})
    keys = ["assistant.tool_calls.function.strict", "assistant.tool_calls.id"]
    assert first_rows(plan_of(tmp_path, CHATS), "chats") == FirstRows(["messages.content.cache_control"], keys, 1, 1)


def test_a_bad_first_row_is_refused_unless_bad_rows_are_skipped(tmp_path: Path):
    write_rows(tmp_path / "chats1.jsonl", {"messages": [ANSWER]})
    write_rows(tmp_path / "chats2.jsonl", {"text": "no messages"})
    with pytest.raises(UserError, match=r"chats2.jsonl:1: no column 'messages'"):
        first_rows(plan_of(tmp_path, CHATS), "chats")
    plan = plan_of(tmp_path, {**CHATS, "datasets.chats.bad_rows": "skip"})
    assert first_rows(plan, "chats") == FirstRows([], [], 1, 2)


@pytest.mark.parametrize(
    ("name", "data"), [("chats.jsonl", b"\n \n"), ("chats.csv", b"messages\n"), ("chats.json", b"[]")]
)
def test_a_file_without_documents_is_refused_as_by_the_job(tmp_path: Path, name: str, data: bytes):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} holds no documents") as refused:
        first_rows(plan_of(tmp_path, CHATS), "chats")
    assert "remove it from the dataset's `files`, or fill it" in refused.value.hint
    skipping = plan_of(tmp_path, {**CHATS, "datasets.chats.bad_rows": "skip"})
    assert first_rows(skipping, "chats").rows_read == 0, "the job leaves such a file out"


def test_a_table_without_rows_is_refused(tmp_path: Path):
    pyarrow.parquet.write_table(
        pyarrow.table({"messages": pyarrow.array([], pyarrow.string())}), tmp_path / "chats.parquet"
    )
    with pytest.raises(UserError, match=r"chats.parquet holds no documents"):
        first_rows(plan_of(tmp_path, CHATS), "chats")


def test_keys_of_later_rows_are_named_up_to_a_number_of_rows_and_bytes(tmp_path: Path):
    """A conversation of 1 MB is the last one that is read of its file."""
    result = {"role": "tool", "content": "20 C", "tool_call_id": "1"}
    later = [{"messages": [ANSWER, result]}, {"messages": [ANSWER]}, {"messages": [{**ANSWER, "late": 1}]}]
    write_rows(tmp_path / "chats1.jsonl", *[{"messages": [ANSWER]}] * 98, *later)
    large = {"messages": [{"role": "assistant", "content": "A" * 1_000_000}]}
    write_rows(tmp_path / "chats2.jsonl", {"messages": [ANSWER]}, large, later[2])
    assert first_rows(plan_of(tmp_path, CHATS), "chats") == FirstRows([], ["tool.tool_call_id"], 102, 2)


def test_bytes_of_arrow_files_and_of_bad_rows_count(tmp_path: Path):
    """No position in an Arrow file is known. A bad row of 1 MB is the last one that is read of its file, too."""
    rows = [{"messages": [{"role": "assistant", "content": "A" * 600_000}], "id": number} for number in range(3)]
    rows[2]["messages"][0]["late"] = "1"
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(tmp_path / "chats1.arrow", table.schema) as stream:
        stream.write_table(table)
    late = {"messages": [ANSWER], "late": 1}
    write_rows(tmp_path / "chats2.jsonl", {"messages": [ANSWER]}, {"text": "A" * 1_000_000}, late)
    plan = plan_of(tmp_path, {**CHATS, "datasets.chats.bad_rows": "skip"})
    assert first_rows(plan, "chats") == FirstRows(["id"], [], 3, 2)


def test_first_and_last_of_many_files_are_read(tmp_path: Path):
    for number in range(120):
        write_rows(tmp_path / f"chats{number:03}.jsonl", {"messages": [ANSWER], f"c{number}": 1})
    columns = first_rows(plan_of(tmp_path, CHATS), "chats").unread_columns
    assert len(columns) == 50 and {"c0", "c119"} <= set(columns)


def test_texts_and_long_lists_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("longhaul.data.readers.first_rows._MAX_LIST_BYTES", 10)
    (tmp_path / "chats.json").write_text(json.dumps([{"messages": 1}]))
    assert first_rows(plan_of(tmp_path, CHATS), "chats") == FirstRows([], [], 0, 0)
    (tmp_path / "prose.txt").write_bytes(b"\xff")
    prose = {"datasets.prose.python_stdlib": ..., "datasets.prose.files": ["prose.txt"]}
    assert first_rows(plan_of(tmp_path, prose), "prose") == FirstRows([], [], 0, 0)


def test_a_dataset_without_own_files_has_no_first_rows(tmp_path: Path):
    assert first_rows(plan_of(tmp_path), "chats") == FirstRows([], [], 0, 0)
