"""Private interfaces of other libraries are reached in compat/ alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from longhaul.config.shipped_files import PACKAGE

# Documented in spite of its underscore: named tuples, os._exit.
DOCUMENTED = {"_asdict", "_replace", "_fields", "_make", "_exit"}


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.parent.name != "compat"]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """Return every private name that a module itself defines: functions, classes, attributes of self, fields."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def private_names(tree: ast.AST) -> list[tuple[int, str]]:
    """Return line and text of every private name that a module uses and does not define."""
    known, found = own_names(tree) | DOCUMENTED, list[tuple[int, str]]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in known:
            found.append((node.lineno, f".{node.attr}"))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("longhaul", "__future__")):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [(node.lineno, f"import of {name}") for name in names if is_private(name)]
    return found


def test_no_module_outside_compat_touches_a_private_name():
    found = {
        str(module.relative_to(PACKAGE)): names
        for module in modules()
        if (names := private_names(ast.parse(module.read_text(encoding="utf-8"))))
    }
    assert found == {}


def test_a_name_that_another_module_defines_is_found():
    """Two modules may use the same private name: one for itself, the other for a library's attribute."""
    assert private_names(ast.parse("engine._step()\nself._step = 1\nfrom torch._inductor import config")) == [
        (3, "import of _inductor")
    ]
    assert private_names(ast.parse("engine._step()")) == [(1, "._step")]


def test_each_module_of_compat_names_the_pinned_version():
    """Whoever pins another version must read the module again."""
    text = (PACKAGE.parents[1] / "envs/constraints.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    wrong = list[str]()
    for module in sorted((PACKAGE / "compat").glob("[a-z]*.py")):
        docstring = " ".join((ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").split())
        named = re.findall(r"([A-Za-z][\w-]*) (\d[\d.]*\d)", docstring.partition("ritten for ")[2])
        fits = [(pinned[library.lower()] + ".").startswith(f"{version}.") for library, version in named]
        wrong += [] if fits and all(fits) else [f"{module.name}: {named}"]
    assert wrong == []
