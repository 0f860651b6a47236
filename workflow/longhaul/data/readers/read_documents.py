"""Read a dataset's files into validated documents, in order: columns, chat roles and message keys.

Nothing is repaired silently: each error names the file and the line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longhaul.config.dataset_config import Dataset
from longhaul.data.readers.formats import read_rows
from longhaul.data.readers.rows_and_file_ranges import BadData, FileRange
from longhaul.errors import UserError

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names for these roles.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


class Document(NamedTuple):
    """One text, or one conversation as [{"role", "content", …}].

    where:    the location for error messages; str() gives "file:line" or "file row n".
    position: bytes of the file that have been read, including this document; for progress.
    """

    content: str | list[Message]
    where: object
    position: int


def document_columns(dataset: Dataset) -> tuple[str, ...]:
    """Return the names of the columns that hold a dataset's documents."""
    names = dataset.columns
    if dataset.kind == "text":
        return (names.text,)
    return (names.prompt, names.completion) if names.prompt and names.completion else (names.messages,)


def read_documents(files: Sequence[str], dataset: Dataset) -> Iterator[Document]:
    """Yield every document of a dataset, in file order; with `bad_rows: skip` bad rows are left out.

    Raises:
        UserError: with file and line, for a missing, empty or damaged file, invalid JSON or CSV, a missing column,
            invalid UTF-8, text that is null or not a string, and malformed conversations.
    """
    if not files:
        raise UserError("the dataset has no files", "check its `files`, or run `longhaul fetch` first")
    for file in files:
        found = None
        for found in read_range(FileRange(Path(file), dataset.format), dataset):
            if isinstance(found, Document):
                yield found
            elif dataset.bad_rows == "stop":
                raise found
        if found is None:
            raise no_documents(file)


def no_documents(file: str) -> BadData:
    """Return the error for a file without documents."""
    hint = "remove it from the dataset's `files`, or fill it"
    return BadData.with_reason("no documents", f"{file} holds no documents", hint)


def read_range(file_range: FileRange, dataset: Dataset) -> Iterator[Document | BadData]:
    """Yield the documents of a range of a file; an error takes the place of a document that cannot be read."""
    columns = document_columns(dataset)
    for row in read_rows(file_range, columns, int(dataset.max_document_mb * 1e6)):
        if isinstance(row.values, BadData):
            yield row.values
            continue
        try:
            yield Document(_content(row.values, columns, row.where, dataset.kind), row.where, row.position)
        except BadData as error:
            yield error


def document_texts(document: Document) -> Iterator[str]:
    """Yield the plain texts of a document: the text itself, or the content of each message."""
    if isinstance(document.content, str):
        yield document.content
    else:
        yield from (message["content"] for message in document.content)


def _content(values: tuple[Any, ...], columns: tuple[str, ...], where: object, kind: str) -> str | list[Message]:
    if kind == "text":
        return _validated_text(values[0], where, columns[0])
    if len(columns) == 1:
        return _validated_messages(values[0], where)
    prompt, completion = values
    return [
        *_prompt_or_completion(prompt, "user", columns[0], where),
        *_prompt_or_completion(completion, "assistant", columns[1], where),
    ]


def _prompt_or_completion(value: Any, role: str, column: str, where: object) -> list[Message]:
    """Return the messages of a prompt or a completion, which is a text or a list of messages."""
    if isinstance(value, list):
        return _validated_messages(value, where)
    return [{"role": role, "content": _validated_text(value, where, column)}]


def _validated_text(value: Any, where: object, name: str) -> str:
    if not isinstance(value, str):
        found = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        reason = "null text" if value is None else "not a string"
        message = f"{where}: {name} is {found}, not a string"
        raise BadData.with_reason(reason, message, "every document needs text: fix or remove this row")
    if not value.isascii():
        _refuse_surrogates(value, where, name)
    return value


def _refuse_surrogates(value: str, where: object, name: str) -> None:
    """Raise BadData for an unpaired surrogate: JSON can contain one as "\\ud800", but UTF-8 cannot encode it."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(value[error.start]):04x}"
        message = f"{where}: {name} holds an unpaired surrogate ({surrogate})"
        raise BadData.with_reason("unpaired surrogate", message, "fix or remove this row") from None


def _validated_messages(value: Any, where: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise _malformed(f"{where}: a conversation is a list of messages, found {found}", "use [{role, content}, …]")
    return [_validated_message(item, f"{where}, message {number}") for number, item in enumerate(value, start=1)]


def _validated_message(value: Any, where: str) -> Message:
    """Return {role, content} from this form or from ShareGPT's {from, value}.

    Other keys that are not null stay, because the chat template may use them.
    """
    if not isinstance(value, dict):
        raise _malformed(f"{where}: expected {{role, content}}, found {type(value).__name__}", "fix the conversation")
    role_key, content_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    for key in (role_key, content_key):
        if key not in value:
            found = ", ".join(map(repr, value)) or "nothing"
            raise _malformed(f"{where}: no {key!r}; found {found}", "use {role, content}")
    extra = {key: item for key, item in value.items() if key not in (role_key, content_key) and item is not None}
    content = _validated_text(value[content_key], where, content_key)
    return {"role": _validated_role(value[role_key], where), "content": content, **extra}


def _validated_role(value: Any, where: str) -> str:
    role = _SHAREGPT_ROLES.get(value, value) if isinstance(value, str) else value
    if role not in ROLES:
        raise _malformed(f"{where}: role {value!r} is not one of {', '.join(ROLES)}", "fix the conversation")
    return role


def _malformed(message: str, hint: str) -> BadData:
    return BadData.with_reason("malformed conversation", message, hint)
