"""Whoever follows the remedy of bad data can read them."""

from __future__ import annotations

import gzip
import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longhaul.data.readers.read_documents import read_documents
from longhaul.errors import UserError
from tests.support.corpora import conversation, dataset, write_jsonl
from tests.support.remedies_in_source import record_places, remedies_in_source
from tests.workflow.test_bad_data import CHATS, DATA, GOOD, arrow_file


@dataclass(frozen=True)
class Remedy:
    """One alternative of a remedy.

    says:     the part of the remedy's text that names it
    content:  new content of the file; None leaves it as it is
    settings: changed keys of the dataset
    command:  what converts the file: words, the file is the last one; stdout replaces it
    """

    says: str
    content: bytes | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["one"]}), sink)
    return sink.getvalue().to_pybytes()


_SKIP = Remedy("leave out such rows with bad_rows: skip", settings={"bad_rows": "skip"})
_WITHOUT_ROW = Remedy("remove this row", GOOD)
REMEDIES: dict[str, list[Remedy]] = {
    "invalid JSON": [Remedy("fix", GOOD + b'{"text": "thr"}\n'), Remedy("remove the line", GOOD), _SKIP],
    "missing column": [Remedy("add the column", GOOD + b'{"text": "x"}\n'), _SKIP],
    "null": [Remedy("every document needs text: fix", GOOD + b'{"text": "x"}\n'), _WITHOUT_ROW, _SKIP],
    "a number": [Remedy("every document needs text: fix", b'{"text": "5"}\n')],
    "invalid UTF-8": [Remedy("iconv -f", command=("iconv", "-f", "latin1", "-t", "utf-8")), _SKIP],
    "unpaired surrogate": [Remedy("fix", b'{"text": "d800"}\n')],
    "no documents": [Remedy("fill it", GOOD)],
    "empty": [Remedy("fill it", GOOD)],
    "truncated": [Remedy("fetch it again", gzip.compress(GOOD))],
    "not Parquet": [Remedy("fetch it again", _parquet())],
    "CSV with another header": [
        Remedy("set the column name", settings={"columns": {"text": "body"}}),
        Remedy("add the column", b"text,n\nx,1\n"),
    ],
    "CSV with an unquoted comma": [Remedy("quote texts that contain commas", b'text,n\n"a, b",1\n')],
    "not an object": [Remedy("write one JSON object", GOOD)],
    "two equal columns": [Remedy("write the file again with one such column", b"text,n\na,1\n")],
    "damaged JSON list": [Remedy("fix the file", b'[{"text": "one"}]'), Remedy("write one object per line", GOOD)],
    "Arrow with invalid UTF-8": [Remedy("write the file again with valid text", arrow_file(b"one"))],
    "unknown suffix": [Remedy("set the dataset's `format`", settings={"format": "text"})],
}
FOLLOWED = [(name, remedy) for name, remedies in REMEDIES.items() for remedy in remedies]


@pytest.mark.parametrize(("name", "remedy"), FOLLOWED, ids=[f"{name}: {remedy.says}" for name, remedy in FOLLOWED])
def test_after_the_remedy_the_data_are_read(name: str, remedy: Remedy, tmp_path: Path):
    path = tmp_path / DATA[name][0]
    path.write_bytes(DATA[name][1])
    with pytest.raises(UserError) as failed:
        list(read_documents([str(path)], dataset()))
    assert remedy.says in failed.value.hint
    if remedy.content is not None:
        path.write_bytes(remedy.content)
    if remedy.command:
        path.write_bytes(subprocess.run([*remedy.command, str(path)], capture_output=True, check=True).stdout)
    assert list(read_documents([str(path)], dataset(**remedy.settings)))


@pytest.mark.parametrize("settings", [{}, {"bad_rows": "skip"}], ids=["a conversation in the named form", "bad_rows"])
@pytest.mark.parametrize("name", CHATS)
def test_after_the_remedy_the_chats_are_read(name: str, settings: dict[str, Any], tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", "messages", [CHATS[name][0], conversation(1)])
    with pytest.raises(UserError) as failed:
        list(read_documents([str(path)], dataset("chat")))
    assert failed.value.hint.endswith(_SKIP.says)
    if not settings:
        write_jsonl(path, "messages", [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]])
    assert len(list(read_documents([str(path)], dataset("chat", **settings)))) == 1


def test_every_remedy_of_bad_data_is_followed():
    assert {*REMEDIES} == {*DATA}


def _call(**keys: Any) -> list[dict[str, Any]]:
    """Return a conversation whose answer calls a tool with these keys of its function."""
    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [{"function": keys}]}
    return [question, answer]


def _answer(content: Any = "A", **keys: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": content, **keys}]


_TOOLS = [{"type": "function", "function": {"name": "add"}}]
CONVERSATIONS: dict[str, tuple[Any, Any, Any, Any]] = {
    "use [{role, content}, …]": ("hello", _answer(), [], []),
    "use [{type: function, function: {…}}, …]": (_answer(), _answer(), {"add": 1}, _TOOLS),
    "fix the conversation": (["hello"], _answer(), [], []),
    "fix the conversation, or": ([{"role": "robot", "content": "x"}], _answer(), [], []),
    "only the assistant calls tools: fix": ([{**_answer()[0], "tool_calls": [1]}], _answer(), [], []),
    "use {role, content}": ([{"content": "x"}], _answer(), [], []),
    "remove this row": (_answer([{"type": "image"}]), _answer(), [], []),
    "keep the one with the reasoning": (_answer(reasoning="a", thinking="b"), _answer(reasoning="a"), [], []),
    "use 0 for turns outside of the loss": (_answer(weight=0.5), _answer(weight=0), [], []),
    "use [{type, function}, …]": (_answer(tool_calls=5), _call(name="add"), [], []),
    "use {type: function, function: {name, arguments}}": (_call(arguments={}), _call(name="add", arguments={}), [], []),
    "use {name: value, …}": (_call(name="add", arguments=[1]), _call(name="add", arguments={"a": 1}), [], []),
    "rename the key": (_call(name="add", parameters={"a": 1}), _call(name="add", arguments={"a": 1}), [], []),
    "remove it": (_call(name="add", parameters={"a": 1}), _call(name="add"), [], []),
    "fix or remove this row": (_call(name="add", arguments="{"), _call(name="add", arguments="{}"), [], []),
}
"""Part of the remedy -> a bad and a good conversation, bad and good tools."""


@pytest.mark.parametrize(("says", "case"), CONVERSATIONS.items(), ids=CONVERSATIONS)
def test_after_the_remedy_the_conversation_is_read(says: str, case: tuple[Any, Any, Any, Any], tmp_path: Path):
    bad, good, tools, good_tools = case
    assert says in refused_conversation(tmp_path, bad, tools)
    assert len(documents_of(tmp_path, good, good_tools)) == 1


def refused_conversation(folder: Path, messages: Any, tools: Any) -> str:
    with pytest.raises(UserError) as refused:
        documents_of(folder, messages, tools)
    return refused.value.hint


def documents_of(folder: Path, messages: Any, tools: Any) -> list[Any]:
    (folder / "a.jsonl").write_text(json.dumps({"messages": messages, "tools": tools}) + "\n")
    return list(read_documents([str(folder / "a.jsonl")], dataset("chat")))


def test_every_remedy_of_a_conversation_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places = record_places(monkeypatch)
    for bad, _, tools, _ in CONVERSATIONS.values():
        refused_conversation(tmp_path, bad, tools)
    module = "data/readers/conversations.py"
    assert [str(one) for one in remedies_in_source() if one.module == module and not one.is_at(places)] == []
