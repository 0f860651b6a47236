"""Checks that single values of a row are texts: a string, valid UTF-8 without lone surrogates, at most 100 levels deep."""

from __future__ import annotations

from longhaul.data.readers.rows_and_file_ranges import BadData

MAX_LEVELS = 100
"""Levels of lists and objects in a value. Far more would end recursive functions, such as those of the chat template."""


def validated_text(value: object, where: object, name: str) -> str:
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


def validate_texts(value: object, where: object, name: str, levels: int = MAX_LEVELS) -> None:
    """Raise BadData unless UTF-8 can encode all strings in a value, with at most this number of levels of lists and objects."""
    if isinstance(value, str):
        validated_text(value, where, name)
    elif isinstance(value, (dict, list)):
        if not levels:
            message = f"{where}: {name} has more than {MAX_LEVELS} levels of lists and objects"
            raise BadData.with_reason("nested too deeply", message, "fix or remove this row")
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            validate_texts(item, where, name, levels - 1)


def _refuse_surrogates(value: str, where: object, name: str) -> None:
    """Raise BadData for an unpaired surrogate: JSON can contain one as "\\ud800", but UTF-8 cannot encode it."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(value[error.start]):04x}"
        message = f"{where}: {name} holds an unpaired surrogate ({surrogate})"
        raise BadData.with_reason("unpaired surrogate", message, "fix or remove this row") from None
