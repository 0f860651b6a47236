"""Describes the machine that a benchmark runs on, and writes the benchmark's result."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def describe_machine(packages: tuple[str, ...]) -> list[str]:
    """Return the command, the machine and the versions, one line each."""
    models = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    command = shlex.join(["python", *sys.orig_argv[1:]])  # with -m, sys.argv has the absolute path of the module
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return [
        f"command: {command}",
        f"machine: {os.cpu_count()} cores, {models[0] if models else platform.machine()}",
        f"versions: Python {platform.python_version()}, {versions}",
    ]


def write_result(name: str, lines: list[str]) -> None:
    """Print the lines and write them to bench/results/<name>.txt."""
    text = "\n".join(lines) + "\n"
    print(text, end="")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.txt").write_text(text)
