"""Turns rows into documents for every dataset: picks columns, joins prompt and completion, applies bad_rows (stop or skip).

Nothing is repaired silently: each error names the file and the line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from longhaul.config.column_template import is_template, template_parts
from longhaul.config.dataset_config import DEFAULT_TOOLS_COLUMN, Dataset
from longhaul.data.readers.conversations import Message, Tool, unread_part_keys, validated_messages, validated_tools
from longhaul.data.readers.rows_and_file_ranges import BadData, FileRange, WantedColumns
from longhaul.data.readers.select_reader import read_rows
from longhaul.data.readers.text_values import validated_text
from longhaul.errors import UserError


class Document(NamedTuple):
    """One text, or one conversation as [{"role", "content", …}].

    where:    the location for error messages; str() gives "file:line" or "file row n".
    position: bytes of the file that have been read, including this document; for progress.
    tools:    the functions that the assistant of a conversation may call.
    unread:   names of the row's columns that nothing reads.
    """

    content: str | list[Message]
    where: object
    position: int
    tools: list[Tool] | None = None
    unread: tuple[str, ...] = ()


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
                raise found.stopping()
        if found is None:
            raise no_documents(file).stopping()


def no_documents(file: str) -> BadData:
    """Return the error for a file without documents."""
    hint = "remove it from the dataset's `files`, or fill it"
    return BadData.with_reason("no documents", f"{file} holds no documents", hint)


def read_range(file_range: FileRange, dataset: Dataset) -> Iterator[Document | BadData]:
    """Yield the documents of a range of a file; an error takes the place of a document that cannot be read."""
    columns = WantedColumns(dataset.columns.required(dataset.kind), dataset.columns.optional(dataset.kind))
    wanted = set(columns.names)
    for row in read_rows(file_range, columns, int(dataset.max_document_mb * 1e6)):
        if isinstance(row.values, BadData):
            row.values.position = row.position
            yield row.values
            continue
        values = dict(zip(columns.names, row.values, strict=True))
        try:
            content = _content(values, row.where, dataset)
            unread = tuple(_validated_name(name, row.where) for name in row.found if name not in wanted)
            if dataset.kind == "chat":
                unread += tuple(_validated_name(name, row.where) for name in _unread_part_keys(values, dataset))
            yield Document(content, row.where, row.position, _tools(values, row.where, dataset), unread)
        except BadData as error:
            error.position = row.position
            yield error


def _validated_name(name: str, where: object) -> str:
    """Return a column's name that UTF-8 can encode: the plan and its record show it."""
    return validated_text(name, where, "a name of a column")


def document_texts(document: Document) -> Iterator[str]:
    """Yield the plain texts of a document: the text itself, or all texts of a conversation and its tools."""
    if isinstance(document.content, str):
        yield document.content
        return
    for message in document.content:
        yield message["content"]
        if len(message) > len(("role", "content")):
            yield from _strings([value for key, value in message.items() if key not in ("role", "content")])
    if document.tools:
        yield from _strings(document.tools)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value, *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _content(values: dict[str, object], where: object, dataset: Dataset) -> str | list[Message]:
    """Return the text or the messages of a row, whose values are given by column."""
    columns = dataset.columns
    if dataset.kind == "text":
        return validated_text(values[columns.text], where, columns.text)
    if not (columns.prompt and columns.completion):
        return validated_messages(values[columns.messages], where)
    prompt = _prompt_or_completion(values, columns.prompt, "user", where)
    completion = _prompt_or_completion(values, columns.completion, "assistant", where)
    return [*map(_as_context, prompt), *completion]


def _unread_part_keys(values: dict[str, object], dataset: Dataset) -> tuple[str, ...]:
    names = (dataset.columns.messages, dataset.columns.prompt, dataset.columns.completion)
    found = [f"{name}.content.{key}" for name in names if name in values for key in unread_part_keys(values[name])]
    return tuple(sorted(found))


def _prompt_or_completion(values: dict[str, object], column: str, role: str, where: object) -> list[Message]:
    """Return the messages of a prompt or a completion: a text, a list of messages, or joined columns."""
    if is_template(column):
        return [{"role": role, "content": _joined_columns(values, column, where)}]
    if isinstance(values[column], list):
        return validated_messages(values[column], where)
    return [{"role": role, "content": validated_text(values[column], where, column)}]


def _as_context(message: Message) -> Message:
    """Return a message of a prompt: an answer in it is outside of the loss, as in TRL, unless the data gives it a weight."""
    return {"weight": 0, **message} if message["role"] == "assistant" else message


def _joined_columns(values: dict[str, object], template: str, where: object) -> str:
    """Fill in a template. An empty or null column is left out together with the text before it."""
    parts = template_parts(template)
    given = {part.column: values[part.column] for part in parts if part.column}
    texts = {name: "" if value is None else validated_text(value, where, name) for name, value in given.items()}
    if not any(texts.values()):
        message = f"{where}: {' and '.join(texts)} are empty"
        raise BadData.with_reason("null text", message, "every document needs text: fix or remove this row")
    kept = [part.literal + texts.get(part.column, "") for part in parts if texts.get(part.column, True)]
    return "".join(kept) if all(texts.values()) else "".join(kept).strip()


def _tools(values: dict[str, object], where: object, dataset: Dataset) -> list[Tool] | None:
    name = dataset.columns.tools or DEFAULT_TOOLS_COLUMN
    return validated_tools(values.get(name), where, name) if dataset.kind == "chat" else None
