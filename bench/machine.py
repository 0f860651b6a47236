"""Describes the machine that a benchmark runs on, and writes the benchmark's result."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).resolve().parents[1]
MODULE_PATH = {"PYTHONPATH": f"{REPOSITORY / 'workflow'}:{REPOSITORY}"}
"""The environment in which another process finds the modules of longhaul and of bench/ in any working folder."""


def describe_machine(packages: tuple[str, ...], command: Sequence[str] = sys.orig_argv[1:]) -> list[str]:
    """Return the command, the machine and the versions, one line each.

    command: the arguments of Python, where another process than this one was started by the user
    """
    models = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return [
        f"command: {shlex.join(['python', *command])}",
        f"machine: {os.cpu_count()} cores, {models[0] if models else platform.machine()}",
        f"versions: Python {platform.python_version()}, {versions}",
    ]


def write_result(name: str, lines: list[str]) -> None:
    """Print the lines and write them to bench/results/<name>.txt."""
    text = "\n".join(lines) + "\n"
    print(text, end="")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.txt").write_text(text)
