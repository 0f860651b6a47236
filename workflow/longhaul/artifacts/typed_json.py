"""Reads any JSON file of a run and checks the types of its fields; also the valid forms of Slurm job ids and host names. A wrong
value is named by its place in the file.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from longhaul.artifacts.atomic_files import DELETE_HINT, read_bytes, refuse_long_integers
from longhaul.errors import UserError

T = TypeVar("T")

SlurmJobId = Annotated[str, Field(pattern=r"^[0-9]+([_+][0-9]+)?$")]
"""A job id of Slurm: 7, 7_1 (array), 7+1 (heterogeneous). State files hold it, and commands get it."""
_HOST_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
HostName = Annotated[str, Field(pattern=f"^{_HOST_NAME}$")]
"""A node's name. No character of it has a meaning for a shell, and it is no option."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Blake3 = Sha256
"""A BLAKE3 hash has as many digits as a SHA-256."""


def is_host_name(value: object) -> bool:
    """Return whether a value is a HostName."""
    return isinstance(value, str) and re.fullmatch(_HOST_NAME, value) is not None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse_json(text: str | bytes, kind: type[T]) -> T:
    """Return the value of a JSON text as `kind`: a dataclass, a TypedDict, or a type such as list[int].

    No value is converted: "1" is no number, 1.0 is no integer, true is no number.

    Raises:
        ValueError: the text is not valid JSON, a value has another type, or an integer is beyond a double; the message names
            the first such value.
    """
    refuse_long_integers(text.encode() if isinstance(text, str) else text)
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(_first_problem(text, error)) from None


def read_typed_json(path: Path, kind: type[T], hint: str = DELETE_HINT) -> T:
    """Read a JSON file as `kind`, as parse_json does.

    Raises:
        UserError: the file is missing or cannot be read, is not valid JSON, or holds a value of another type.
    """
    text = read_bytes(path)
    try:
        return parse_json(text, kind)
    except ValueError as error:
        raise UserError(f"{path}: {error}", hint) from None


def _first_problem(text: str | bytes, error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    if problem["type"] == "json_invalid":
        return f"no valid JSON: {problem['msg'].removeprefix('Invalid JSON: ')}"
    place = _place(text, problem)
    if problem["type"] in ("missing", "extra_forbidden"):
        return f"`{place}` is {'missing' if problem['type'] == 'missing' else 'unknown'}"
    return f"`{place}` is {_short(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _place(text: str | bytes, problem: ErrorDetails) -> str:
    """Return the keys that lead to a problem. pydantic's location also has the name of the type that it tried of several."""
    value, keys = json.loads(text), list[str]()
    for part in problem["loc"]:
        try:
            value = value[part]
        except (LookupError, TypeError):
            continue
        keys.append(str(part))
    if problem["type"] == "missing":
        keys.append(str(problem["loc"][-1]))
    return ".".join(keys) or "the whole value"


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
