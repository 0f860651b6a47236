"""Strict YAML reader: no duplicate keys, no types that JSON does not have, no unbounded nesting or aliases."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import yaml

from longhaul.config.validation_messages import shortened
from longhaul.errors import UserError

_MAX_VALUES, _MAX_DEPTH = 100_000, 20


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a duplicate key, and reads 1e-4 as a number, as YAML 1.2 does."""


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, typing.Hashable) and key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} occurs twice, in lines {seen[key]} and {line}")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. All keys are strings and all values have types that JSON has.

    Raises:
        UserError: the file is missing, unreadable, invalid, too large or too deeply nested, or holds other types.
    """
    value = _parse(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected keys and values, found {shortened(value)}", "docs/config.md lists the keys")
    _check_json_types(value, path)
    return value


def _parse(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "give the path of an existing YAML file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder", "give the path of a YAML file") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "give the path of a readable YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}", "save the file as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(
            f"{path} is not valid YAML: {_one_line(error)}", "correct the line; docs/config.md shows the format"
        ) from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply", f"use at most {_MAX_DEPTH} levels") from None
    except ValueError as error:  # an invalid date, or a number with too many digits
        raise UserError(f"{path}: {_one_line(error)}", "quote the value, or correct it") from None


def _one_line(error: Exception) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{problem or error}{where}".replace("\n", " ")


def _check_json_types(value: Any, path: Path) -> None:
    """Raise UserError for a type that JSON does not have, a key that is no string, or too many values.

    Aliases repeat a value, so a short file can hold very many values.
    """
    pending: list[tuple[Any, tuple[str, ...]]] = [(value, ())]
    count = 0
    while pending:
        value, keys = pending.pop()
        count += 1
        if count > _MAX_VALUES or len(keys) > _MAX_DEPTH:
            raise UserError(
                f"{path} holds more than {_MAX_VALUES} values or {_MAX_DEPTH} levels after its aliases (&, *) are expanded",
                "write the config without aliases; one glob can name many files",
            )
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise UserError(
                        f"{path}: {'.'.join((*keys, str(key)))}: key {key!r} is not a string", "quote the key"
                    )
            pending += [(inner, (*keys, key)) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(inner, (*keys, str(number))) for number, inner in enumerate(value)]
        elif not isinstance(value, str | int | float | bool | None):
            where = ".".join(keys) or "the file"
            raise UserError(
                f"{path}: {where} is {value}, which YAML reads as a {type(value).__name__}", "quote the value"
            )
