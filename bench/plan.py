"""Times of the demo's dry run, compared with an empty Snakefile, and of `longhaul plan` with 1 and with 50 files of chats.

A user waits for them before jobs are submitted. The commands run one after the other in each round: Snakemake with the demo,
Snakemake with an empty Snakefile, `longhaul run demo -n`, which checks the config first and then starts Snakemake in a shorter
way, and the two plans, which read the first rows of each file. A round before the others is not counted: Python compiles the
package in it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from bench.machine import MODULE_PATH, REPOSITORY, describe_machine, write_result

ROUNDS = 7
FILES, CHATS = 50, 2000


def main() -> None:
    """Run the commands in turn, ROUNDS times, and write medians."""
    with tempfile.TemporaryDirectory() as name:
        commands = {**_dry_runs(Path(name)), **_plans_of_chats(Path(name))}
        times_s: dict[str, list[float]] = {kind: [] for kind in commands}
        for _ in range(ROUNDS + 1):
            for kind, arguments in commands.items():
                times_s[kind].append(_seconds(arguments))
    medians_s = {kind: statistics.median(values[1:]) for kind, values in times_s.items()}
    demo, empty, _, one_file, many_files = medians_s.values()
    write_result(
        "plan",
        [
            *describe_machine(("snakemake", "pydantic")),
            *(f"{kind}: {seconds:.2f} s, median of {ROUNDS}" for kind, seconds in medians_s.items()),
            f"demo / empty Snakefile: {demo / empty:.2f}",
            f"{FILES} files - 1 file: {many_files - one_file:.2f} s",
            f"aim: the demo within 1.6 s, {FILES} files within 2 s more than 1 file",
        ],
    )


def _dry_runs(folder: Path) -> dict[str, list[str]]:
    (folder / "Snakefile").write_text("rule all:\n    output: 'x'\n    shell: 'touch x'\n")
    demo = ["snakemake", "-s", str(REPOSITORY / "Snakefile"), "--profile", str(REPOSITORY / "profiles" / "local")]
    commands = {
        "snakemake -n, demo": demo,
        "snakemake -n, empty Snakefile": ["snakemake", "-s", str(folder / "Snakefile"), "--cores", "1"],
        "longhaul run demo -n": ["longhaul", "run", "demo"],
    }
    return {kind: [*arguments, "-n", "--directory", str(folder)] for kind, arguments in commands.items()}


def _plans_of_chats(folder: Path) -> dict[str, list[str]]:
    """Write files of conversations, and a config like the demo's for the first one and one for all of them."""
    for number in range(FILES):
        lines = (json.dumps({"id": f"{number}-{row}", "messages": _chat(row)}) for row in range(CHATS))
        (folder / f"chats-{number:02}.jsonl").write_text("\n".join(lines) + "\n")
    commands = {}
    for kind, pattern in (("1 file", "chats-00.jsonl"), (f"{FILES} files", "chats-*.jsonl")):
        config = yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text())
        config["datasets"]["docstrings"] = {"kind": "chat", "files": [pattern]}
        path = folder / f"{kind.replace(' ', '-')}.yaml"
        path.write_text(yaml.safe_dump(config))
        commands[f"longhaul plan, {kind} of chats"] = ["longhaul", "plan", str(path)]
    return commands


def _chat(row: int) -> list[dict[str, str]]:
    """Return a conversation of about 1 kB."""
    return [
        {"role": "user", "content": f"Question {row}: " + "what does this ship carry over the sea " * 8},
        {"role": "assistant", "content": f"Answer {row}: " + "it carries letters and tea from port to port " * 14},
    ]


def _seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    environment = {**os.environ, **MODULE_PATH}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else Python compiles the package in each round
    subprocess.run([sys.executable, "-m", *arguments], check=True, capture_output=True, env=environment)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
