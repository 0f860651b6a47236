"""Writes the map of package, rules and scripts in README.md from their first lines: python docs/package_map.py [--check]."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, README = ROOT / "workflow" / "longhaul", ROOT / "README.md"
RULES, SCRIPTS = ROOT / "workflow" / "rules", ROOT / "templates" / "sbatch"
BEGIN, END = "<!-- package map: make generate -->", "<!-- end of package map -->"


def package_map() -> str:
    """Return one table per folder: each file with the first sentence of its docstring or comment."""
    folders = [PACKAGE, *sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)]
    tables = [_table(folder) for folder in folders]
    tables.append(_rows("workflow/rules", "the rules of the Snakefile, one file per step", sorted(RULES.glob("*.smk"))))
    tables.append(_rows("templates/sbatch", "scripts of jobs and containers", sorted(SCRIPTS.glob("*.sh"))))
    return "\n".join(tables)


def _table(folder: Path) -> str:
    modules = [
        path for path in sorted([*folder.glob("*.py"), *folder.glob("*.yaml")]) if not path.name.startswith("__")
    ]
    if not modules:
        return ""
    title = folder.relative_to(PACKAGE).as_posix()
    name = "longhaul" if title == "." else title
    return _rows(name, _first_sentence(folder / "__init__.py"), modules)


def _rows(name: str, contents: str, files: list[Path]) -> str:
    rows = [f"| `{path.name}` | {_first_sentence(path)} |" for path in files]
    return "\n".join([f"\n| **{name}/** | {contents} |", "| --- | --- |", *rows])


def _first_sentence(file: Path) -> str:
    """Return the first sentence of a file's docstring, or of its first comment, without its full stop."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text)) or ""
    elif file.suffix == ".smk":
        docstring = text.split('"""')[1].strip().partition("\n")[0]
    else:
        lines = [line for line in text.split("\n") if not line.startswith(("#!", "# shellcheck"))]
        docstring = lines[0].removeprefix("# ")
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
