"""A dataset's files -> checked documents, in order. Nothing is repaired in silence: what is wrong is named by place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longhaul.config.dataset_config import Dataset
from longhaul.data.readers.formats import rows
from longhaul.data.readers.rows import BadData, Part
from longhaul.errors import UserError

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names for the same things.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


class Document(NamedTuple):
    """One text, or one conversation as [{"role", "content", …}].

    where:    "file:line" or "file row n" when printed, for error messages.
    position: bytes of the file read so far, for progress.
    """

    content: str | list[Message]
    where: object
    position: int


def columns_of(dataset: Dataset) -> tuple[str, ...]:
    """The columns a dataset's documents are made of."""
    names = dataset.columns
    if dataset.kind == "text":
        return (names.text,)
    return (names.prompt, names.completion) if names.prompt and names.completion else (names.messages,)


def read_documents(files: Sequence[str], dataset: Dataset) -> Iterator[Document]:
    """Every document of a dataset, in file order; bad rows are refused, or left out where the dataset says so.

    Raises UserError (with file and line) for a missing, empty or damaged file, broken JSON or CSV, a missing column,
    invalid UTF-8, text that is null or no string, and conversations of a wrong shape.
    """
    if not files:
        raise UserError("the dataset has no files", "check its `files`, or run `longhaul fetch` first")
    for file in files:
        found = None
        for found in documents_of(Part(Path(file), dataset.format), dataset):
            if isinstance(found, Document):
                yield found
            elif dataset.bad_rows == "stop":
                raise found
        if found is None:
            raise no_documents(file)


def no_documents(file: str) -> BadData:
    """A file that holds none."""
    hint = "remove it from the dataset's `files`, or fill it"
    return BadData.because("no documents", f"{file} holds no documents", hint)


def documents_of(part: Part, dataset: Dataset) -> Iterator[Document | BadData]:
    """The documents of a part of a file; what cannot be read comes as an error in its place."""
    columns = columns_of(dataset)
    for row in rows(part, columns, int(dataset.max_document_mb * 1e6)):
        if isinstance(row.values, BadData):
            yield row.values
            continue
        try:
            yield Document(_content(row.values, columns, row.where, dataset.kind), row.where, row.position)
        except BadData as error:
            yield error


def _content(values: tuple[Any, ...], columns: tuple[str, ...], where: object, kind: str) -> str | list[Message]:
    if kind == "text":
        return _checked_text(values[0], where, columns[0])
    if len(columns) == 1:
        return _messages(values[0], where)
    prompt, completion = values
    return [*_turns(prompt, "user", columns[0], where), *_turns(completion, "assistant", columns[1], where)]


def _turns(value: Any, role: str, column: str, where: object) -> list[Message]:
    """A prompt or a completion: a text, or messages."""
    if isinstance(value, list):
        return _messages(value, where)
    return [{"role": role, "content": _checked_text(value, where, column)}]


def texts(document: Document) -> Iterator[str]:
    """The plain texts of a document, for training a tokenizer: the text itself, or each message's content."""
    if isinstance(document.content, str):
        yield document.content
    else:
        yield from (message["content"] for message in document.content)


def _checked_text(value: Any, where: object, name: str) -> str:
    if not isinstance(value, str):
        found = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        reason = "null text" if value is None else "not a string"
        message = f"{where}: {name} is {found}, not a string"
        raise BadData.because(reason, message, "every document needs text: mend or remove it")
    if not value.isascii():
        _refuse_surrogates(value, where, name)
    return value


def _refuse_surrogates(value: str, where: object, name: str) -> None:
    """JSON can smuggle half characters in as "\\ud800"; they have no UTF-8 form."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        message = f"{where}: {name} holds half of a surrogate pair ({half})"
        raise BadData.because("half a surrogate pair", message, "mend or remove it") from None


def _messages(value: Any, where: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise _misshapen(f"{where}: a conversation is a list of messages, found {found}", "[{role, content}, …]")
    return [_message(item, f"{where}, message {i}") for i, item in enumerate(value, start=1)]


def _message(value: Any, where: str) -> Message:
    """{role, content}, or ShareGPT's {from, value}; other keys that are set are kept for the template."""
    if not isinstance(value, dict):
        raise _misshapen(f"{where}: expected {{role, content}}, found {type(value).__name__}", "mend the conversation")
    role_key, content_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    for key in (role_key, content_key):
        if key not in value:
            raise _misshapen(
                f"{where}: no {key!r}; found {', '.join(map(repr, value)) or 'nothing'}", "{role, content}"
            )
    extra = {key: item for key, item in value.items() if key not in (role_key, content_key) and item is not None}
    content = _checked_text(value[content_key], where, content_key)
    return {"role": _role(value[role_key], where), "content": content, **extra}


def _role(value: Any, where: str) -> str:
    role = _SHAREGPT_ROLES.get(value, value) if isinstance(value, str) else value
    if role not in ROLES:
        raise _misshapen(f"{where}: role {value!r} is not one of {', '.join(ROLES)}", "mend the conversation")
    return role


def _misshapen(message: str, hint: str) -> BadData:
    return BadData.because("misshapen conversation", message, hint)
