"""Writes the demo's datasets from Python's standard library: source code as texts, docstrings as chats."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from longhaul.artifacts.atomic_files import atomic_path, file_sha256
from longhaul.config.dataset_config import Columns, PythonStdlib
from longhaul.errors import UserError

_MB = 1_000_000
# Tests and generated tables are larger than all code that people wrote.
_EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data", "encodings", "lib2to3"}
_MAX_ANSWER_CHARACTERS = 600
_MIN_ANSWER_CHARACTERS = 20
_HELD_OUT = 25
"""One docstring in this number is a question of the evaluation instead of a chat."""
_CHOICES = 4


def write_demo_corpus(kind: str, settings: PythonStdlib, out: Path, columns: Columns) -> dict[str, object]:
    """Write the demo's JSONL file and return its entry of the lock file; the same Python gives the same bytes.

    Raises:
        UserError: this Python has no standard library on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = 0
    written_bytes = documents = 0
    held_out: list[tuple[str, str]] = []
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for path in _module_files(root):
            try:
                source = path.read_text(encoding="utf-8")
                rows = list(_rows(kind, source, _module_name(path, root), columns, held_out))
            except (UnicodeDecodeError, SyntaxError):
                skipped += 1
                continue
            for row in rows:
                line = json.dumps(row, ensure_ascii=False) + "\n"
                written_bytes += len(line.encode())
                documents += 1
                stream.write(line)
            if written_bytes >= settings.max_mb * _MB:
                break
    if not documents:
        raise UserError(
            f"no Python sources in {root}",
            "this Python has no standard library on disk: set the dataset's `files` instead",
        )
    if held_out:
        _write_questions(held_out, out.with_stem(f"{out.stem}-evaluation"))
    return {
        "path": str(root),
        "files": [str(out)],
        "documents": documents,
        "skipped_files": skipped,
        "bytes": written_bytes,
        "sha256": file_sha256(out),
    }


def _module_files(root: Path) -> Iterator[Path]:
    """Yield every module in the order of the hashes of their names, so that a size limit keeps an even sample."""
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).hexdigest()):
        if not _EXCLUDED_FOLDERS & set(name.parts):
            yield root / name


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _rows(
    kind: str, source: str, module: str, columns: Columns, held_out: list[tuple[str, str]]
) -> Iterator[dict[str, object]]:
    """Yield the rows of one module; questions and answers for the evaluation are appended to `held_out` instead."""
    if kind == "text":
        if source.strip():
            yield {columns.text: source}
        return
    for name, docstring in _docstrings(source, module):
        question = f"What does {name} do?"
        if int(hashlib.sha256(name.encode()).hexdigest(), 16) % _HELD_OUT == 0:
            held_out.append((question, docstring))
        else:
            yield {
                columns.messages: [{"role": "user", "content": question}, {"role": "assistant", "content": docstring}]
            }


def _write_questions(held_out: list[tuple[str, str]], out: Path) -> None:
    """Write one row per question: {"question", "answer", "choices", "label"}; wrong choices are answers of the next questions."""
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for number, (question, answer) in enumerate(held_out):
            choices = [held_out[(number + offset) % len(held_out)][1] for offset in range(_CHOICES)]
            label = number % _CHOICES  # the right choice is not always the first one
            choices[0], choices[label] = choices[label], choices[0]
            row = {"question": question, "answer": answer, "choices": choices, "label": label}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _docstrings(source: str, module: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, first paragraph of its docstring) for each documented function and class."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
            answer = inspect.cleandoc(text).split("\n\n")[0].strip() if text else ""
            if _MIN_ANSWER_CHARACTERS <= len(answer) <= _MAX_ANSWER_CHARACTERS:
                yield f"{module}.{node.name}", answer
