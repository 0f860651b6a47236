"""Compares the time of the demo's dry run with that of an empty Snakefile. A user waits for it before jobs are submitted.

Three commands, one after the other in each round: Snakemake with the demo, Snakemake with an empty Snakefile, and
`longhaul run demo -n`, which checks the config first and then starts Snakemake in a shorter way. A round before the others is not
counted: Python compiles the package in it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.machine import MODULE_PATH, REPOSITORY, describe_machine, write_result

ROUNDS = 7


def main() -> None:
    """Run the commands in turn, ROUNDS times, and write medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "Snakefile").write_text("rule all:\n    output: 'x'\n    shell: 'touch x'\n")
        demo = ["snakemake", "-s", str(REPOSITORY / "Snakefile"), "--profile", str(REPOSITORY / "profiles" / "local")]
        commands = {
            "snakemake -n, demo": demo,
            "snakemake -n, empty Snakefile": ["snakemake", "-s", str(folder / "Snakefile"), "--cores", "1"],
            "longhaul run demo -n": ["longhaul", "run", "demo"],
        }
        times_s: dict[str, list[float]] = {kind: [] for kind in commands}
        for _ in range(ROUNDS + 1):
            for kind, arguments in commands.items():
                times_s[kind].append(_seconds([*arguments, "-n", "--directory", name]))
    medians_s = {kind: statistics.median(values[1:]) for kind, values in times_s.items()}
    ours, empty, _ = medians_s.values()
    write_result(
        "plan",
        [
            *describe_machine(("snakemake", "pydantic")),
            *(f"{kind}: {seconds:.2f} s, median of {ROUNDS}" for kind, seconds in medians_s.items()),
            f"demo / empty Snakefile: {ours / empty:.2f}",
            "aim: the demo within 1.6 s",
        ],
    )


def _seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    environment = {**os.environ, **MODULE_PATH}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else Python compiles the package in each round
    subprocess.run([sys.executable, "-m", *arguments], check=True, capture_output=True, env=environment)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
