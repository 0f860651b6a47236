"""Writes the map of the package in README.md from the modules' docstrings: python docs/package_map.py [--check]."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, README = ROOT / "workflow" / "longhaul", ROOT / "README.md"
BEGIN, END = "<!-- package map: make generate -->", "<!-- end of package map -->"


def package_map() -> str:
    """Return one table per folder: each module with the first sentence of its docstring."""
    folders = [PACKAGE, *sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)]
    return "\n".join(_table(folder) for folder in folders)


def _table(folder: Path) -> str:
    modules = [
        path for path in sorted([*folder.glob("*.py"), *folder.glob("*.yaml")]) if not path.name.startswith("__")
    ]
    if not modules:
        return ""
    title = folder.relative_to(PACKAGE).as_posix()
    name = "longhaul" if title == "." else title
    rows = [f"| `{path.name}` | {_first_sentence(path)} |" for path in modules]
    return "\n".join([f"\n| **{name}/** | {_first_sentence(folder / '__init__.py')} |", "| --- | --- |", *rows])


def _first_sentence(module: Path) -> str:
    """Return the first sentence of a module's docstring, or of a data file's first comment, without its full stop."""
    text = module.read_text(encoding="utf-8")
    is_code = module.suffix == ".py"
    docstring = (ast.get_docstring(ast.parse(text)) or "") if is_code else text.partition("\n")[0].removeprefix("# ")
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<!et al)(?<!vs)\. ", paragraph)[0].removesuffix(".").replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    made = f"{before}{BEGIN}\n{package_map()}\n\n{END}{after}"
    if "--check" in sys.argv and made != text:
        sys.exit("README.md: the package map is out of date; run make generate")
    README.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
