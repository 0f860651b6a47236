"""The remedies in the source of the package: where each is written, and its text as far as the source tells it.

A remedy may be written where the error is made, in a constant, in what a function returns, or where a function is called that
makes the error of an argument.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from longhaul.config.shipped_files import PACKAGE
from longhaul.errors import UserError

_PLACE_OF_REMEDY = {
    **dict.fromkeys(("AllocationTooShort", "BadData", "BadNodesError", "BrokenLinkError", "InputError"), 1),
    **dict.fromkeys(("NodeLinkError", "RendezvousError", "TrainingFailure", "UserError"), 1),
    "with_reason": 2,
    "DiskFull": 4,
}
"""Class or constructor of an error for users -> the place of the remedy in its arguments."""
_MOST_CALLERS = 4
"""How often an argument is followed from a function to its callers."""
Place = tuple[str, int]
"""Module below the package, and a line of it."""
Texts = dict[str, tuple[str, ...]]
"""Name of a constant or variable, or of a function as `name()` -> what it may be."""


@dataclass(frozen=True)
class RemedyInSource:
    """text: constants by their values, {} for what is filled in; the branches of a condition are remedies of their own"""

    module: str
    lines: range
    text: str

    def is_at(self, places: set[Place]) -> bool:
        """Return whether one of these lines is in a call that made the error."""
        return any((self.module, line) in places for line in self.lines)

    def __str__(self) -> str:
        return f"{self.module}: {self.text}"


@dataclass(frozen=True)
class _Function:
    """A function or method of the package.

    named: texts of the constants that it sees and of its local variables
    """

    module: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    is_method: bool
    named: Texts = field(compare=False)

    def parameters(self) -> list[str]:
        """Return the names of its parameters in the order in which a caller gives them."""
        names = [argument.arg for argument in (*self.node.args.posonlyargs, *self.node.args.args)]
        return [*names[self.is_method :], *(argument.arg for argument in self.node.args.kwonlyargs)]

    def default(self, parameter: str) -> ast.expr | None:
        arguments = self.node.args
        positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        defaults = dict(zip(reversed(positional), reversed(arguments.defaults), strict=False))
        only_by_name = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        defaults |= {argument.arg: value for argument, value in only_by_name if value}
        return defaults.get(parameter)


@cache
def remedies_in_source() -> tuple[RemedyInSource, ...]:
    """Return the remedy of every error for users that the package makes; those without one are left out."""
    found = (
        remedy
        for name, place in _PLACE_OF_REMEDY.items()
        for function, call in _calls().get(name, ())
        for argument in _argument(call, place, ("hint", "choices"))
        for remedy in _remedies(argument, function, call)
    )
    return tuple(dict.fromkeys(found))


def _remedies(
    node: ast.expr, function: _Function, call: ast.Call, depth: int = _MOST_CALLERS
) -> Iterator[RemedyInSource]:
    """Return the remedies that an expression in a call may be: of a parameter, what the callers of its function pass."""
    if isinstance(node, ast.IfExp | ast.BoolOp):
        for branch in node.values if isinstance(node, ast.BoolOp) else (node.body, node.orelse):
            yield from _remedies(branch, function, call, depth)
    elif isinstance(node, ast.Name) and node.id in function.parameters() and node.id not in function.named and depth:
        default = function.default(node.id)
        for caller, calls_it in _calls().get(function.node.name, ()):
            if passed := _argument(calls_it, function.parameters().index(node.id), (node.id,)):
                yield from _remedies(passed[0], caller, calls_it, depth - 1)
            elif default:
                yield from _remedies(default, function, call, depth)
    else:
        lines = range(call.lineno, (call.end_lineno or call.lineno) + 1)
        # What a caller passes may be for another function of the same name, as pyarrow's read_json.
        texts = texts_of(node, function.named) or ("{}",) * (depth == _MOST_CALLERS)
        yield from (RemedyInSource(function.module, lines, text) for text in texts if text)


def _argument(call: ast.Call, place: int, names: tuple[str, ...]) -> list[ast.expr]:
    """Return the argument at a place, or with one of these names; empty where the call has none."""
    return [*call.args[place : place + 1], *(word.value for word in call.keywords if word.arg in names)][:1]


@cache
def _calls() -> dict[str, list[tuple[_Function, ast.Call]]]:
    """Return the calls in the package, with the function that holds each, by the name of the called function."""
    found: dict[str, list[tuple[_Function, ast.Call]]] = {}
    for function in _functions():
        for node in ast.walk(function.node):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                found.setdefault(name, []).append((function, node))
    return found


@cache
def _functions() -> tuple[_Function, ...]:
    named = constants()
    found: list[_Function] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module, tree = str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8"))
        own = named | _texts_of_names(tree.body, named)
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for body in (tree, *classes):
            seen = own | _texts_of_names(body.body, own)
            for node in body.body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    local = _texts_of_names(ast.walk(node), seen)
                    found.append(_Function(module, node, body is not tree, seen | local))
    return tuple(found)


@cache
def constants() -> Texts:
    """Return the text of every constant of the package that holds one string, and of every function, by name."""
    found: Texts = {}
    for module in PACKAGE.rglob("*.py"):
        for name, texts in _texts_of_names(ast.parse(module.read_text(encoding="utf-8")).body, {}).items():
            found[name] = (*found.get(name, ()), *texts)
    return found


def _texts_of_names(nodes: Iterable[ast.AST], named: Texts) -> Texts:
    """Return the texts of each name that the nodes assign, and of each function that they define, as `name()`."""
    found: Texts = {}
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=name), *_], value=ast.expr() as value):
                values = [value]
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                values = [value]
            case ast.FunctionDef(name=called):
                name = f"{called}()"
                values = [part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value]
            case _:
                continue
        if texts := tuple(text for value in values for text in texts_of(value, named)):
            found[name] = (*found.get(name, ()), *texts)
    return found


def texts_of(node: ast.AST, named: Texts) -> tuple[str, ...]:
    """Return what an expression may be: constants by their names, every branch of a condition, {} for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            found: tuple[str, ...] = (text,)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            found = named.get(name, ("{}",))
        case ast.Call(func=ast.Name(id=name)):
            found = named.get(f"{name}()", ())
        case ast.Call(func=ast.Attribute(value=replaced, attr="replace")):
            found = texts_of(replaced, named)
        case ast.FormattedValue(value=value):
            found = texts_of(value, named) or ("{}",)
        case ast.JoinedStr(values=[*parts]):
            found = _joined(parts, named)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            found = _joined([left, right], named)
        case ast.IfExp(body=body, orelse=orelse):
            found = (*texts_of(body, named), *texts_of(orelse, named))
        case ast.BoolOp(values=[*parts]):
            found = tuple(text for part in parts for text in texts_of(part, named))
        case _:
            found = ()
    return found


def _joined(parts: Sequence[ast.expr], named: Texts) -> tuple[str, ...]:
    return tuple("".join(words) for words in product(*(texts_of(part, named) for part in parts)))


def record_places(monkeypatch: pytest.MonkeyPatch) -> set[Place]:
    """Return a set that gets the places of every error for users that is made from now on: where it is made, and the calls
    that lead there, because a remedy may be an argument.
    """
    places: set[Place] = set()
    initialize = UserError.__init__

    def record(error: UserError, *args: Any, **keys: Any) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                places.add((str(path.relative_to(PACKAGE)), frame.f_lineno))
            frame = frame.f_back
        initialize(error, *args, **keys)

    monkeypatch.setattr(UserError, "__init__", record)
    return places
