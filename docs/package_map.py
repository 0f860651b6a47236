"""Writes the list of files in README.md, all but tests/unit, which mirrors the package: python docs/package_map.py [--check]."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, README = ROOT / "workflow" / "longhaul", ROOT / "README.md"
OTHER_FOLDERS = {
    "config/examples": "configs to start from, which `longhaul init` copies",
    "config/evaluation": "tasks of lm-evaluation-harness for the demo",
    "workflow/rules": "the rules of the Snakefile, one file per step",
    "templates/sbatch": "scripts of jobs and containers; Jinja templates end in .j2",
    "templates/deepspeed": "DeepSpeed's config",
    "templates/chat": "chat templates",
    "templates/report": "the report page",
    "profiles/local": "how Snakemake runs on this machine",
    "profiles/slurm": "how Snakemake runs through Slurm",
    "envs": "pinned versions; conda environments and a container definition made from them",
    "bench": "benchmarks; make bench-<name> runs them, records are in bench/results",
    "tests": "what all tests use",
    "tests/support": "helpers of several tests: small configs and runs, made-up hardware, processes that tests start as ranks",
    "tests/support/injected": "what Python imports first in processes whose faults a test injects",
    "tests/support/pyxis": "Slurm's container options on the test cluster",
    "tests/workflow": "rules, reruns, bad configs and data, the demo",
    "tests/recovery": "resume, resharding, bad steps, damaged checkpoints",
    "tests/cluster": "runs on a real Slurm cluster on this machine",
    "tests/faults": "the fault matrix, and random faults",
    "tests/parity": "comparison with plain PyTorch",
    "tests/gpu": "tests on GPUs",
    "tests/serve": "exports in other engines",
}
"""Folder outside of the package -> what it contains."""
BEGIN, END = "<!-- package map: make generate -->", "<!-- end of package map -->"


def package_map() -> str:
    """Return one table per folder: each file with the first sentence of its docstring or comment."""
    folders = [PACKAGE, *sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)]
    tables = [_table(folder) for folder in folders]
    others = [_rows(name, contents, files_of(name)) for name, contents in OTHER_FOLDERS.items()]
    return "\n".join([*tables, *others])


def files_of(folder: str) -> list[Path]:
    """Return the files of a folder outside of the package, without hidden ones."""
    return sorted(
        path for path in (ROOT / folder).iterdir() if path.is_file() and not path.name.startswith((".", "__"))
    )


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
    """Return the first sentence of a file's docstring, Jinja comment or first comment, without its full stop."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text)) or ""
    elif file.suffix == ".smk":
        docstring = text.split('"""')[1].strip().partition("\n")[0]
    elif file.suffix in (".j2", ".jinja"):
        docstring = text.split("#}")[0].removeprefix("{#").strip("- \n")
    else:
        lines = [line for line in text.split("\n") if not line.startswith(("#!", "# shellcheck"))]
        docstring = lines[0].removeprefix("# ").removeprefix("/* ")
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
