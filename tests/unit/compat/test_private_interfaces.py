"""Private interfaces of other libraries are reached in compat/ alone."""

from __future__ import annotations

import ast
from pathlib import Path

from longhaul.config.shipped_files import PACKAGE

# Documented in spite of its underscore: named tuples, os._exit.
DOCUMENTED = {"_asdict", "_replace", "_fields", "_make", "_exit"}


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.parent.name != "compat"]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """Return every private name that the package itself defines: functions, classes, attributes of self, fields."""
    names: set[str] = set()
    for module in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("self", "cls")
            ):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def test_no_module_outside_compat_touches_a_private_name():
    known, found = own_names() | DOCUMENTED, []
    for module in modules():
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            place = f"{module.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in known:
                found.append(f"{place}: .{node.attr}")
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("longhaul", "__future__")):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                found += [f"{place}: import of {name}" for name in names if is_private(name)]
    assert found == []
