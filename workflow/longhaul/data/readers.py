"""A dataset's files -> checked documents, in order. Nothing is repaired in silence: what is wrong is refused by place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longhaul.config.models import Dataset
from longhaul.data.formats import Row, rows
from longhaul.errors import UserError

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names for the same things.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


@dataclass(frozen=True)
class Document:
    """One text, or one conversation as [{"role", "content", …}].

    file_index: which of the dataset's files it came from.
    where:      "file:line" or "file row n", for error messages.
    read_share: share of that file read so far, for progress.
    """

    content: str | list[Message]
    file_index: int
    where: str
    read_share: float


def read_documents(files: Sequence[str], dataset: Dataset) -> Iterator[Document]:
    """Every document of a dataset, in file order.

    Raises UserError (with file and line) for a missing, empty or damaged file, broken JSON or CSV, a missing column,
    invalid UTF-8, text that is null or no string, and conversations of a wrong shape.
    """
    if not files:
        raise UserError("the dataset has no files", "check its `files`, or run `longhaul fetch` first")
    is_chat = dataset.kind == "chat"
    column = dataset.columns.messages if is_chat else dataset.columns.text
    for index, file in enumerate(files):
        row = None
        for row in rows(Path(file), dataset.format, column):
            content = _messages(row) if is_chat else _checked_text(row.value, row.where, column)
            yield Document(content, index, row.where, row.read_share)
        if row is None:
            raise UserError(f"{file} holds no documents", "remove it from the dataset's `files`, or fill it")


def texts(document: Document) -> Iterator[str]:
    """The plain texts of a document, for training a tokenizer: the text itself, or each message's content."""
    if isinstance(document.content, str):
        yield document.content
    else:
        yield from (message["content"] for message in document.content)


def _checked_text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        found = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise UserError(f"{where}: {name} is {found}, not a string", "every document needs text: mend or remove it")
    if not value.isascii():
        _refuse_surrogates(value, where, name)
    return value


def _refuse_surrogates(value: str, where: str, name: str) -> None:
    """JSON can smuggle half characters in as "\\ud800"; they have no UTF-8 form."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise UserError(f"{where}: {name} holds half of a surrogate pair ({half})", "mend or remove it") from None


def _messages(row: Row) -> list[Message]:
    if not isinstance(row.value, list) or not row.value:
        found = "an empty list" if row.value == [] else type(row.value).__name__
        raise UserError(f"{row.where}: a conversation is a list of messages, found {found}", "[{role, content}, …]")
    return [_message(value, f"{row.where}, message {i}") for i, value in enumerate(row.value, start=1)]


def _message(value: Any, where: str) -> Message:
    """{role, content}, or ShareGPT's {from, value}; other keys that are set are kept for the template."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected {{role, content}}, found {type(value).__name__}", "mend the conversation")
    role_key, content_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    for key in (role_key, content_key):
        if key not in value:
            raise UserError(f"{where}: no {key!r}; found {', '.join(map(repr, value)) or 'nothing'}", "{role, content}")
    extra = {key: item for key, item in value.items() if key not in (role_key, content_key) and item is not None}
    content = _checked_text(value[content_key], where, content_key)
    return {"role": _role(value[role_key], where), "content": content, **extra}


def _role(value: Any, where: str) -> str:
    role = _SHAREGPT_ROLES.get(value, value) if isinstance(value, str) else value
    if role not in ROLES:
        raise UserError(f"{where}: role {value!r} is not one of {', '.join(ROLES)}", "mend the conversation")
    return role
