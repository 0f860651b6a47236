"""Every format gives the same documents, and every error has a location."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from longhaul.data.readers.read_documents import Document, read_documents
from longhaul.errors import UserError
from tests.support.corpora import conversation, dataset

TEXTS = ["plain", 'line\nbreak, comma and "quotes"', "naïve 北京 🚢", " spaces kept "]


def _read(path: Path, kind: str = "text", **settings: Any) -> list[Any]:
    return [document.content for document in read_documents([str(path)], dataset(kind, **settings))]


def _jsonl_bytes(column: str, values: list[Any]) -> bytes:
    return "".join(json.dumps({column: value}) + "\n" for value in values).encode()


def _zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def _write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["id", "text"], *([str(i), text] for i, text in enumerate(TEXTS))])


def _write_arrow(path: Path, values: list[Any], column: str, in_file: bool = False) -> None:
    table = pa.table({column: values})
    opened = pa.ipc.new_file(str(path), table.schema) if in_file else pa.ipc.new_stream(str(path), table.schema)
    with opened as writer:
        writer.write_table(table, max_chunksize=2)


FORMATS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + _jsonl_bytes("text", TEXTS) + b"\n  \n"),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(_jsonl_bytes("text", TEXTS))),
    "a.jsonl.zst": lambda path: path.write_bytes(_zstd(_jsonl_bytes("text", TEXTS))),
    "two-members.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(_jsonl_bytes("text", TEXTS[:1])) + gzip.compress(_jsonl_bytes("text", TEXTS[1:]))
    ),
    "a.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1)),
    "lines-in.json": lambda path: path.write_bytes(_jsonl_bytes("text", TEXTS)),
    "a.csv": _write_csv,
    "a.parquet": lambda path: pyarrow.parquet.write_table(pa.table({"id": [1, 2, 3, 4], "text": TEXTS}), path),
    "stream.arrow": lambda path: _write_arrow(path, TEXTS, "text"),
    "file.arrow": lambda path: _write_arrow(path, TEXTS, "text", in_file=True),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str):
    FORMATS[name](tmp_path / name)
    assert _read(tmp_path / name) == TEXTS


def test_a_text_file_is_one_document(tmp_path: Path):
    (tmp_path / "a.txt").write_text("two\nlines\n")
    (tmp_path / "b.rst").write_text("another")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    files = [str(tmp_path / name) for name in ("a.txt", "b.rst", "c.txt.gz")]
    found = list(read_documents(files, dataset(format="text")))
    assert [document.content for document in found] == ["two\nlines\n", "another", "packed"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "arrow"])
def test_conversations_keep_roles_and_content(tmp_path: Path, ending: str):
    chats, path = [conversation(i, 2) for i in range(5)], tmp_path / f"chats.{ending}"
    if ending == "jsonl":
        path.write_bytes(_jsonl_bytes("messages", chats))
    elif ending == "parquet":
        pyarrow.parquet.write_table(pa.table({"messages": chats}), path)
    else:
        _write_arrow(path, chats, "messages")
    assert _read(path, "chat") == chats


def test_sharegpt_roles_are_converted(tmp_path: Path):
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "a.jsonl").write_bytes(_jsonl_bytes("conversations", [turns]))
    found = _read(tmp_path / "a.jsonl", "chat", columns={"messages": "conversations"})
    assert found == [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]]


def _chat(path: Path, **row: Any) -> Document:
    path.write_text(json.dumps(row))
    return next(read_documents([str(path)], dataset("chat")))


ANSWER = {"role": "assistant", "content": "A"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}


def nested(levels: int) -> list[Any]:
    """Return lists in lists."""
    return [nested(levels - 1)] if levels > 1 else []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": [{"type": "text", "text": "A"}, "B"]}, {"content": "AB"}),
        ({"content": None, "tool_calls": [CALL]}, {"content": "", "tool_calls": [CALL]}),
        ({"tool_calls": [{"name": "f", "arguments": '{"a": null}'}]}, {"content": "", "tool_calls": [CALL]}),
        ({"content": "A", "tool_calls": [], "reasoning_content": "", "name": None}, {"content": "A"}),
        (
            {"tool_calls": [{"name": "f", "id": "1", "index": 0, "parameters": None}]},
            {
                "content": "",
                "tool_calls": [
                    {
                        "type": "function",
                        "function": {"name": "f", "id": "1", "index": 0, "parameters": None, "arguments": {}},
                    }
                ],
            },
        ),
        ({"content": "A", "weight": 0}, {"content": "A", "weight": 0}),
        ({"reasoning_content": "R"}, {"content": "", "reasoning_content": "R"}),
    ],
)
def test_forms_of_an_answer(tmp_path: Path, message: dict[str, Any], expected: dict[str, Any]):
    found = _chat(tmp_path / "a.jsonl", messages=[{"role": "assistant", **message}])
    assert found.content == [{"role": "assistant", **expected}]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": None}, "message 1: content is null, not a string"),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "content has a part of type 'image_url'; only text"),
        ({"content": "A", "weight": 0.5}, "message 1: weight is 0.5; it is 0 or 1"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "message 1, tool call 1: no name of a function"),
        ({"tool_calls": [{"name": "f", "arguments": "{a"}]}, "tool call 1: arguments is not valid JSON: '{a'"),
        (
            {"tool_calls": [{"name": "f", "arguments": '{"a": ' + "1" * 5000 + "}"}]},
            'tool call 1: arguments is not valid JSON: \'{"a": 111',
        ),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, "tool call 1: arguments is list, not an object"),
        (
            {"tool_calls": [{"name": "f", "parameters": {"a": 1}}]},
            "call 1: no 'arguments' in the function, but 'parameters'",
        ),
        ({"tool_calls": [{"function": {"name": "f"}, "arguments": {"a": 1}}]}, "in the function, but 'arguments'"),
        ({"content": "A", "reasoning_content": ["R"]}, "message 1: reasoning_content is list"),
        ({"content": "A", "reasoning": "R", "thinking": "T"}, "message 1: reasoning and thinking differ"),
        ({"content": "A", "name": "\ud83d"}, "a key of the message holds an unpaired surrogate"),
        ({"content": "A", "name": nested(101)}, "a key of the message has more than 100 levels"),
        ({"tool_calls": [{"name": "f", "arguments": json.dumps({"a": nested(500)})}]}, "more than 100 levels"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_is_refused(tmp_path: Path, message: dict[str, Any], expected: str):
    with pytest.raises(UserError) as caught:
        _chat(tmp_path / "a.jsonl", messages=[{"role": "assistant", **message}])
    assert expected in caught.value.message and "a.jsonl:1" in caught.value.message


def test_only_the_assistant_calls_tools(tmp_path: Path):
    empty = {"role": "user", "content": "Q", "tool_calls": []}
    assert _chat(tmp_path / "a.jsonl", messages=[empty]).content == [{"role": "user", "content": "Q"}]
    with pytest.raises(UserError, match=r"message 1: tool_calls of role user"):
        _chat(tmp_path / "a.jsonl", messages=[{**empty, "tool_calls": [CALL]}])


def test_tools_are_a_list_or_its_json_text(tmp_path: Path):
    path, tools = tmp_path / "a.jsonl", [{"type": "function", "function": {"name": "f"}}]
    for value, expected in ((tools, tools), (json.dumps(tools), tools), (None, None), ([], None), ("", None)):
        assert _chat(path, messages=[ANSWER], tools=value).tools == expected
    assert _chat(path, messages=[ANSWER]).tools is None
    with pytest.raises(UserError, match=r"a.jsonl:1: tools is not a list of JSON schemas"):
        _chat(path, messages=[ANSWER], tools=["f"])
    with pytest.raises(UserError, match="no column 'functions'"):
        _read(path, "chat", columns={"tools": "functions"})


def test_a_null_field_of_a_parquet_struct_is_a_missing_key(tmp_path: Path):
    """All messages of a Parquet column have the same keys: those that a message did not have are null."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    chats = [[ANSWER, {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "x"}]}]]
    pyarrow.parquet.write_table(pa.table({"messages": chats}), tmp_path / "a.parquet")
    assert _read(tmp_path / "a.parquet", "chat") == [[ANSWER, {**chats[0][1], "content": ""}]]


def test_columns_that_nothing_reads_are_named(tmp_path: Path):
    row = {"id": 1, "text": "A", "meta": {}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "a.csv").write_text("id,text,meta\n1,A,\n")
    pyarrow.parquet.write_table(pa.table({"id": [1], "text": ["A"], "meta": ["x"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        (found,) = read_documents([str(tmp_path / name)], dataset())
        assert found.unread == ("id", "meta")


ALPACA = {"prompt": "{instruction}\n\nInput:\n{input}", "completion": "output"}


@pytest.mark.parametrize(
    ("instruction", "given", "expected"),
    [
        ("Add.", "1 2", "Add.\n\nInput:\n1 2"),
        ("Sing.", "", "Sing."),
        ("Sing.", None, "Sing."),
        ("", "1 2", "Input:\n1 2"),
    ],
)
def test_a_template_joins_columns(tmp_path: Path, instruction: str, given: str | None, expected: str):
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": instruction, "input": given, "output": "A"}))
    messages = [{"role": "user", "content": expected}, ANSWER]
    assert _read(tmp_path / "a.jsonl", "chat", columns=ALPACA) == [messages]


def test_answers_in_a_prompt_are_outside_of_the_loss_unless_they_have_a_weight(tmp_path: Path):
    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    row = {"prompt": [question, answer, {**answer, "weight": 1}, question], "completion": [answer, question, answer]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (found,) = _read(tmp_path / "a.jsonl", "chat", columns={"prompt": "prompt", "completion": "completion"})
    weights = [message.get("weight") for message in found if isinstance(message, dict)]
    assert weights == [None, 0, 1, None, None, None, None]


def test_a_template_whose_columns_are_all_empty_is_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "", "input": None, "output": "A"}))
    with pytest.raises(UserError, match=r"a.jsonl:1: instruction and input are empty"):
        _read(tmp_path / "a.jsonl", "chat", columns=ALPACA)


def _long_gzip() -> bytes:
    return gzip.compress(_jsonl_bytes("text", [f"document {i * i}" for i in range(50_000)]))


def _parquet_of(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def _bad_utf8_parquet() -> bytes:
    values = pa.Array.from_buffers(pa.binary(), 2, pa.array([b"fine", b"\xff\xfe"]).buffers()).view(pa.string())
    return _parquet_of(text=values)


def _twice_in_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), sink)
    return sink.getvalue().to_pybytes()


# file name, its bytes, kind, text of the message
BROKEN: dict[str, tuple[str, bytes | None, str, str]] = {
    "missing file": ("a.jsonl", None, "text", "a.jsonl does not exist"),
    "empty file": ("a.jsonl", b"", "text", "a.jsonl is empty"),
    "blank lines only": ("a.jsonl", b"\n\n", "text", "a.jsonl holds no documents"),
    "empty list": ("a.json", b"[]", "text", "a.json holds no documents"),
    "empty table": ("a.parquet", _parquet_of(text=pa.array([], pa.string())), "text", "a.parquet holds no documents"),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), "text", "a.jsonl.gz holds no documents"),
    "invalid line": ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "text", "a.jsonl:2: not valid JSON"),
    "invalid line in gzip": (
        "a.jsonl.gz",
        gzip.compress(b'{"text": "a"}\nnonsense'),
        "text",
        "a.jsonl.gz:2: not valid",
    ),
    "line is no object": ("a.jsonl", b'"text"\n', "text", "a.jsonl:1: expected a JSON object, found str"),
    "invalid list": ("a.json", b'[{"text": "a"},\n {"text": }]', "text", "a.json:2: not valid JSON"),
    "missing column": (
        "a.jsonl",
        b'{"text": "a"}\n{"body": "b"}\n',
        "text",
        "a.jsonl:2: no column 'text'; found 'body'",
    ),
    "missing column in list": ("a.json", b'[{"body": "b"}]', "text", "a.json row 1: no column 'text'; found 'body'"),
    "missing column in CSV": ("a.csv", b"id,body\n1,b\n", "text", "a.csv:1: no column 'text'; found 'id', 'body'"),
    "missing column in parquet": (
        "a.parquet",
        _parquet_of(body=["b"]),
        "text",
        "a.parquet: no column 'text'; found 'body'",
    ),
    "wrong number of CSV fields": (
        "a.csv",
        b"id,text\n1,a\n2,b,c\n",
        "text",
        "a.csv:3: 3 fields, but the header has 2",
    ),
    "invalid UTF-8 in CSV": ("a.csv", b"id,text\n1,a\n2,\xff\n", "text", "a.csv:3: byte 0xff is not valid UTF-8"),
    "a column twice in parquet": ("a.parquet", _twice_in_parquet(), "text", "a.parquet: 2 columns are named 'text'"),
    "a column twice in CSV": ("a.csv", b"text,text\n1,a\n", "text", "a.csv:1: 2 columns are named 'text'"),
    "deep list": ("a.json", b"[" * 200_000, "text", "a.json: not valid JSON: nested too deep"),
    "long integer": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b", "id": ' + b"1" * 5000 + b"}\n",
        "text",
        "a.jsonl:2: not valid JSON: an integer of more than 4300 digits",
    ),
    "long integer in list": (
        "a.json",
        b'[{"text": "b", "id": ' + b"1" * 5000 + b"}]",
        "text",
        "a.json: not valid JSON: an integer of more than 4300 digits",
    ),
    "open quote in CSV": ("a.csv", b'id,text\n1,"a\n', "text", "not valid CSV"),
    "invalid UTF-8": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "\xff"}\n',
        "text",
        "a.jsonl:2: byte 0xff is not valid UTF-8",
    ),
    "invalid UTF-8 in text": ("a.txt", b"one\ntwo\n\xe9t\xe9", "text", "a.txt:3: byte 0xe9 is not valid UTF-8"),
    "invalid UTF-8 in parquet": ("a.parquet", _bad_utf8_parquet(), "text", "a.parquet row 2: not valid UTF-8"),
    "UTF-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "text", "a.jsonl:1: byte 0xff is not valid UTF-8"),
    "unpaired surrogate": ("a.jsonl", b'{"text": "\\ud83d"}', "text", "a.jsonl:1: text holds an unpaired surrogate"),
    "unpaired surrogate in a column's name": (
        "a.jsonl",
        b'{"text": "a", "\\ud800x": 1}',
        "text",
        "a.jsonl:1: a name of a column holds an unpaired surrogate (\\ud800)",
    ),
    "invalid UTF-8 in a column's name": (
        "a.csv",
        b"text,\xff\na,1\n",
        "text",
        "a.csv:2: a name of a column holds an unpaired surrogate (\\udcff)",
    ),
    "null text": ("a.jsonl", b'{"text": "a"}\n\n{"text": null}\n', "text", "a.jsonl:3: text is null, not a string"),
    "null in parquet": ("a.parquet", _parquet_of(text=["a", None]), "text", "a.parquet row 2: text is null"),
    "number for text": ("a.jsonl", b'{"text": 5}', "text", "a.jsonl:1: text is int '5', not a string"),
    "truncated gzip": ("a.jsonl.gz", _long_gzip()[:-5000], "text", "a.jsonl.gz after line "),
    "truncated zstd": ("a.jsonl.zst", _zstd(b'{"text": "a"}\n' * 9999)[:-4], "text", "cannot read"),
    "not gzip": ("a.jsonl.gz", b'{"text": "a"}', "text", "cannot read"),
    "not parquet": ("a.parquet", b"not parquet at all", "text", "cannot read"),
    "not arrow": ("a.arrow", b"not arrow at all", "text", "cannot read"),
    "unknown suffix": ("a.xml", b"<a/>", "text", "a.xml: unknown file suffix"),
    "messages are text": ("a.jsonl", b'{"messages": "hi"}', "chat", "a.jsonl:1: a conversation is a list of messages"),
    "no messages": (
        "a.jsonl",
        b'{"messages": []}',
        "chat",
        "a.jsonl:1: a conversation is a list of messages, found an",
    ),
    "message is text": ("a.jsonl", b'{"messages": ["hi"]}', "chat", "a.jsonl:1, message 1: expected {role, content}"),
    "no role": ("a.jsonl", b'{"messages": [{"content": "hi"}]}', "chat", "a.jsonl:1, message 1: no 'role'"),
    "no content": ("a.jsonl", b'{"messages": [{"role": "user"}]}', "chat", "a.jsonl:1, message 1: no 'content'"),
    "null content": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null}]}',
        "chat",
        "a.jsonl:1, message 2: content is null",
    ),
    "unknown role": (
        "a.jsonl",
        b'{"messages": [{"role": "robot", "content": "q"}]}',
        "chat",
        "a.jsonl:1, message 1: role 'robot' is not one of system",
    ),
    "another column": (
        "a.jsonl",
        b'{"id": 1, "conversations": []}',
        "chat",
        "a.jsonl:1: no column 'messages'; found 'id', 'conversations'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_error_is_reported_with_its_location(tmp_path: Path, case: str):
    name, data, kind, expected = BROKEN[case]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        _read(tmp_path / name, kind)
    assert expected in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "stream.arrow", "a.csv", "a.txt"])
def test_every_format_refuses_a_document_that_is_too_long(tmp_path: Path, name: str):
    long, path = "é" * 600_000, tmp_path / name  # 1.2 MB
    writers: dict[str, Callable[[], Any]] = {
        "a.jsonl": lambda: path.write_bytes(_jsonl_bytes("text", [long])),
        "a.json": lambda: path.write_text(json.dumps([{"text": long}])),
        "a.parquet": lambda: pyarrow.parquet.write_table(pa.table({"text": [long]}), path),
        "stream.arrow": lambda: _write_arrow(path, [long], "text"),
        "a.csv": lambda: path.write_text(f"text\n{long}\n"),
        "a.txt": lambda: path.write_text(long),
    }
    writers[name]()
    with pytest.raises(UserError, match="longer than 1 MB, the dataset's max_document_mb"):
        _read(path, max_document_mb=1)
    assert len(_read(path, max_document_mb=8)) == 1


def test_a_bad_row_of_a_csv_does_not_affect_other_rows(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,a\n2,\xff\n3\n4,\xc3\xa9\n")
    assert _read(tmp_path / "a.csv", bad_rows="skip") == ["a", "é"]


def test_a_dataset_without_files_or_a_missing_file_is_refused_until_there_is_one(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    for files, message in (([], "the dataset has no files"), ([str(path)], "a.jsonl does not exist")):
        with pytest.raises(UserError, match=message):
            list(read_documents(files, dataset()))
    path.write_text('{"text": "one"}\n')
    assert list(read_documents([str(path)], dataset()))
