"""Reads YAML 1.2 strictly: no duplicate keys, no tags, `no` is a text and not false; limits of size, depth and aliases."""

from __future__ import annotations

import re
import stat
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import yaml

from longhaul.config.shipped_files import KEY_LIST
from longhaul.config.validation_messages import shortened
from longhaul.errors import UserError

_TEXT = "tag:yaml.org,2002:str"
_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH, _MAX_DIGITS = 200_000, 100_000, 20, 1000


class _StrictLoader(yaml.SafeLoader):
    """Loader for YAML 1.2's core schema (https://yaml.org/spec/1.2.2, section 10.3), in which 010 is 10 and `no` is a text."""

    yaml_implicit_resolvers: ClassVar[dict[str, object]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse a tag: with one, a value of another type than the text shows could be given."""
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem=f"tag {event.tag} is not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Hashable, object]:
    seen: dict[Hashable, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(
                problem="a list or a mapping is no key; quote a text with braces or brackets",
                problem_mark=key_node.start_mark,
            )
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if key == "<<":
            raise yaml.MarkedYAMLError(
                problem="merge keys (<<) are not part of YAML 1.2; write the keys out", problem_mark=key_node.start_mark
            )
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} occurs twice, in lines {seen[key]} and {line}")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _construct_int(loader: _StrictLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    if len(text) > _MAX_DIGITS:  # Python prints no number of thousands of digits, not even in a message
        problem = f"a number of {len(text)} digits; numbers have at most {_MAX_DIGITS}"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
for _type, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_type}", re.compile(f"^(?:{_pattern})$"), [*_first, *([""] if _type == "null" else [])]
    )


def read_yaml(path: Path) -> dict[str, object]:
    """Return the mapping in a YAML file. All keys are strings, and JSON has the types of all values.

    Raises:
        UserError: the file is missing, unreadable, invalid, too large or too deeply nested, or has other keys.
    """
    value = _parse(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected keys and values, found {shortened(value)}", f"{KEY_LIST} lists the keys")
    _check_json_keys(value, path)
    return value


def _parse(path: Path) -> object:
    try:
        _check_file(path)
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # nosec B506  # a SafeLoader
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
            f"{path} is not valid YAML: {_one_line(error)}", f"correct the line; {KEY_LIST} shows the format"
        ) from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply", f"use at most {_MAX_DEPTH} levels") from None


@dataclass(frozen=True)
class WrittenText:
    """A text among the values of a YAML file, and the part of the file that it is written in."""

    keys: tuple[str, ...]
    value: str
    start: int
    end: int


def written_texts(yaml_text: str) -> list[WrittenText]:
    """Return the texts among the values of a valid YAML file, in its order. An alias (*) is no place of its own."""
    root = yaml.compose(yaml_text, Loader=_StrictLoader)  # nosec B506  # a SafeLoader
    found = {value.start: value for value in (_texts_of(root, ()) if root else ())}
    return [found[start] for start in sorted(found)]


def _texts_of(node: yaml.Node, keys: tuple[str, ...]) -> Iterator[WrittenText]:
    if isinstance(node, yaml.ScalarNode) and node.tag == _TEXT:
        yield WrittenText(keys, node.value, node.start_mark.index, node.end_mark.index)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _texts_of(value, (*keys, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _texts_of(value, (*keys, str(number)))


def _check_file(path: Path) -> None:
    """Raise UserError for something that may never end, such as a pipe or a device, and for a file that is no config."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is a pipe or a device, not a regular file", "give the path of a YAML file")
    if found.st_size > _MAX_BYTES:
        raise UserError(
            f"{path} has {found.st_size} bytes; a config or site file has at most {_MAX_BYTES}",
            "give the path of a config; one glob can name many data files",
        )


def _one_line(error: Exception) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{problem or error}{where}".replace("\n", " ")


def _check_json_keys(value: object, path: Path) -> None:
    """Raise UserError for a key that is no string, or too many values.

    Aliases repeat a value, so a short file can hold very many values.
    """
    pending: list[tuple[object, tuple[str, ...]]] = [(value, ())]
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
