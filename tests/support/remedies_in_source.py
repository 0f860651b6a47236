"""The remedies in the source of the package: where each is written, and its text as far as the source tells it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from longhaul.config.shipped_files import PACKAGE
from longhaul.errors import UserError

_PLACE_OF_REMEDY = {
    **dict.fromkeys(("BadData", "BadNodesError", "BrokenLinkError", "InputError", "NodeLinkError"), 1),
    **dict.fromkeys(("RendezvousError", "TrainingFailure", "UserError"), 1),
    "with_reason": 2,
}
"""Class or constructor of an error for users -> the place of the remedy in its arguments."""
Place = tuple[str, int]
"""Module below the package, and a line of it."""


@dataclass(frozen=True)
class RemedyInSource:
    """text: constants by their values, every branch of a condition, {} for what is filled in"""

    module: str
    lines: range
    text: str

    def is_at(self, places: set[Place]) -> bool:
        """Return whether one of these lines is in the call that makes the error."""
        return any((self.module, line) in places for line in self.lines)

    def __str__(self) -> str:
        return f"{self.module}: {self.text}"


@cache
def remedies_in_source() -> tuple[RemedyInSource, ...]:
    """Return the remedy of every error for users that the package makes; those without one are left out."""
    return tuple(_remedies_in_source())


def _remedies_in_source() -> Iterator[RemedyInSource]:
    named = constants()
    for path in sorted(PACKAGE.rglob("*.py")):
        module, tree = str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8"))
        own = named | dict(pair for node in tree.body for pair in _assignment(node))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for function in (*tree.body, *(node for found in classes for node in found.body)):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            local = dict(pair for node in ast.walk(function) for pair in _assignment(node))
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                name = getattr(call.func, "id", getattr(call.func, "attr", ""))
                argument = next(iter(call.args[_PLACE_OF_REMEDY.get(name, len(call.args)) :]), None)
                if argument and (text := texts_of(argument, own | local)):
                    yield RemedyInSource(module, range(call.lineno, (call.end_lineno or call.lineno) + 1), text)


def constants() -> dict[str, str]:
    """Return the text of every constant of the package that holds one string, by name."""
    found: dict[str, str] = {}
    for module in PACKAGE.rglob("*.py"):
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            for name, text in _assignment(node):
                found[name] = f"{found.get(name, '')}{text}\n"
    return found


def _assignment(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (text := texts_of(node.value, {})):
        yield node.targets[0].id, text


def texts_of(node: ast.AST, named: dict[str, str]) -> str:
    """Return the text of an expression: constants by their names, every branch of a condition, {} for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return named.get(name, "{}")
        case ast.FormattedValue(value=value):
            return texts_of(value, named) or "{}"
        case ast.JoinedStr(values=parts):
            separator = ""
        case ast.BinOp(left=left, right=right):
            separator, parts = "", [left, right]
        case ast.IfExp(body=body, orelse=orelse):
            separator, parts = "\n", [body, orelse]
        case _:
            return ""
    return separator.join(texts_of(part, named) for part in parts)


def record_places(monkeypatch: pytest.MonkeyPatch) -> set[Place]:
    """Return a set that gets the place of every error for users that is made from now on."""
    places: set[Place] = set()
    initialize = UserError.__init__

    def record(error: UserError, *args: Any, **keys: Any) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame and frame.f_code.co_name == "__init__":  # of a subclass
            frame = frame.f_back
        path = Path(frame.f_code.co_filename) if frame else Path()
        if frame and path.is_relative_to(PACKAGE):
            places.add((str(path.relative_to(PACKAGE)), frame.f_lineno))
        initialize(error, *args, **keys)

    monkeypatch.setattr(UserError, "__init__", record)
    return places
