"""Names in the package say where a thing is: no module and no class name is used twice."""

from __future__ import annotations

import ast
from collections import defaultdict

from longhaul.config.shipped_files import PACKAGE

MODULES = sorted(PACKAGE.rglob("*.py"))


def places(names: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the names that are at several places, with the places."""
    found = defaultdict[str, list[str]](list)
    for name, place in names:
        found[name].append(place)
    return {name: where for name, where in found.items() if len(where) > 1}


def test_no_module_name_is_used_twice():
    named = [module for module in MODULES if not module.stem.startswith("__")]
    assert places([(module.name, str(module.relative_to(PACKAGE))) for module in named]) == {}


def test_no_class_name_is_used_twice():
    classes = [
        (node.name, str(module.relative_to(PACKAGE)))
        for module in MODULES
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert places(classes) == {}


def test_only_the_command_line_and_errors_are_at_the_top():
    top = {module.name for module in MODULES if module.parent == PACKAGE}
    assert top == {"__init__.py", "__main__.py", "cli.py", "errors.py"}
