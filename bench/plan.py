"""Compares the time of the demo's dry run with that of an empty Snakefile. A user waits for it before jobs are submitted."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.machine import REPOSITORY, describe_machine, write_result

ROUNDS = 7


def main() -> None:
    """Alternate both commands ROUNDS times, and print medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "Snakefile").write_text("rule all:\n    output: 'x'\n    shell: 'touch x'\n")
        demo = ["-s", str(REPOSITORY / "Snakefile"), "--profile", str(REPOSITORY / "profiles" / "local")]
        commands = {"demo": demo, "empty Snakefile": ["-s", str(folder / "Snakefile"), "--cores", "1"]}
        times_s: dict[str, list[float]] = {kind: [] for kind in commands}
        for _ in range(ROUNDS):
            for kind, arguments in commands.items():
                times_s[kind].append(_seconds([*arguments, "-n", "--directory", name]))
    lines = [f"{kind}: {statistics.median(values):.2f} s, median of {ROUNDS}" for kind, values in times_s.items()]
    ratio = statistics.median(times_s["demo"]) / statistics.median(times_s["empty Snakefile"])
    write_result(
        "plan",
        [
            *describe_machine(("snakemake", "pydantic")),
            "snakemake -n:",
            *lines,
            f"ratio: {ratio:.2f}",
            "aim: the demo within 3 s",
        ],
    )


def _seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "snakemake", *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
