"""Parses templates that join columns of a row, such as "{instruction}\\n{input}"; a text without braces is a column's name."""

from __future__ import annotations

from string import Formatter
from typing import NamedTuple


class TemplatePart(NamedTuple):
    """Literal text, and the column that follows it; "" at the end of a template."""

    literal: str
    column: str


def is_template(value: str) -> bool:
    """Return whether a value joins columns, instead of naming one."""
    return "{" in value or "}" in value


def template_parts(value: str) -> list[TemplatePart]:
    """Return the parts of a template; {{ and }} stand for braces.

    Raises:
        ValueError: a brace is not closed, or the braces hold something else than a column's name.
    """
    parts = []
    for literal, column, format_spec, conversion in Formatter().parse(value):
        if column == "" or format_spec or conversion:
            raise ValueError(f"{value!r} must hold only names of columns in braces, such as {{instruction}}")
        parts.append(TemplatePart(literal, column or ""))
    if not any(part.column for part in parts):
        raise ValueError(f"{value!r} names no column")
    return parts


def template_columns(value: str) -> tuple[str, ...]:
    """Return the names of the columns that a template joins, or the one column that is named."""
    if not is_template(value):
        return (value,)
    return tuple(part.column for part in template_parts(value) if part.column)
