"""Validate single values of a row that have to be texts."""

from __future__ import annotations

from typing import Any

from longhaul.data.readers.rows_and_file_ranges import BadData


def validated_text(value: Any, where: object, name: str) -> str:
    """Return a value that is a string which UTF-8 can encode.

    Raises:
        BadData: with the location `where`, for the value of `name`.
    """
    if not isinstance(value, str):
        found = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        reason = "null text" if value is None else "not a string"
        message = f"{where}: {name} is {found}, not a string"
        raise BadData.with_reason(reason, message, "every document needs text: fix or remove this row")
    if not value.isascii():
        _refuse_surrogates(value, where, name)
    return value


def validate_texts(value: Any, where: object, name: str) -> None:
    """Raise BadData unless UTF-8 can encode all strings in a value."""
    if isinstance(value, str):
        validated_text(value, where, name)
    elif isinstance(value, dict):
        validate_texts([*value, *value.values()], where, name)
    elif isinstance(value, list):
        for item in value:
            validate_texts(item, where, name)


def _refuse_surrogates(value: str, where: object, name: str) -> None:
    """Raise BadData for an unpaired surrogate: JSON can contain one as "\\ud800", but UTF-8 cannot encode it."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(value[error.start]):04x}"
        message = f"{where}: {name} holds an unpaired surrogate ({surrogate})"
        raise BadData.with_reason("unpaired surrogate", message, "fix or remove this row") from None
