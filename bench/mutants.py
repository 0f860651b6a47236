"""Measures how many small faults the unit tests find: mutmut changes one expression of a module at a time.

    python -m bench.mutants [MODULE ...]     MODULE: a path below workflow/longhaul, for example report/goodput.py

A mutant is killed if one of the nearest unit tests fails or does not end. Without arguments all modules of MODULES are measured
and bench/results/mutants.txt is written. With arguments the surviving mutants of these modules are shown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

from bench.machine import describe_machine, write_result

REPOSITORY = Path(__file__).resolve().parents[1]
SCRATCH = REPOSITORY / "build" / "mutants"
LOG = SCRATCH / "mutmut.log"
PROCESSES = 2
MODULES = (
    "planning/*.py",
    "scheduling/cancelled_jobs.py",
    "scheduling/deadline_updater.py",
    "scheduling/check_disk_space.py",
    "scheduling/resource_requests.py",
    "scheduling/retry_policy.py",
    "report/goodput.py",
    "train/lr_schedule.py",
    "data/sampling/*.py",
    "artifacts/leases.py",
)
TESTS = (
    "tests/unit/planning",
    "tests/unit/scheduling",
    "tests/unit/report/test_goodput.py",
    "tests/unit/train/test_lr_schedule.py",
    "tests/unit/data/sampling",
    "tests/unit/artifacts/test_leases.py",
    "tests/unit/artifacts/test_clocks.py",
)
SLOW_TESTS = "tests/unit/data/sampling/test_document_isolation.py"
SHARED_FILES = ("Snakefile", "bench", "config", "envs", "profiles", "templates", "tests", "workflow/rules")
"""What the tests read beside the package."""
KILLED = ("killed", "timeout", "segfault", "suspicious")
AIM = 85.0


def main() -> None:
    """Run mutmut; write the record, or show the surviving mutants of the named modules."""
    parser = argparse.ArgumentParser(description="Measure how many small faults the unit tests find.")
    parser.add_argument("modules", nargs="*", help="paths below workflow/longhaul; without them all, with a record")
    chosen = parser.parse_args().modules
    start_s = time.monotonic()
    _prepare_scratch(tuple(chosen) or MODULES)
    _run_mutmut("run", "--max-children", str(PROCESSES))
    results = _read_results()
    lines = _table(results)
    if chosen:
        _show_survivors(results)
        print("\n".join(lines))
        return
    minutes = (time.monotonic() - start_s) / 60
    write_result("mutants", [*describe_machine(("mutmut", "pytest", "hypothesis")), *_facts(minutes), *lines])


def _prepare_scratch(modules: tuple[str, ...]) -> None:
    """Lay out a project as mutmut expects it: it strips `src/` from paths to get the names of modules."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
    (SCRATCH / "src").mkdir(parents=True)
    (SCRATCH / "src" / "longhaul").symlink_to(REPOSITORY / "workflow" / "longhaul")
    for name in SHARED_FILES:
        (SCRATCH / name).parent.mkdir(exist_ok=True)
        (SCRATCH / name).symlink_to(REPOSITORY / name)
    settings = {
        "source_paths": ["src/longhaul"],
        "only_mutate": [f"src/longhaul/{module}" for module in modules],
        "also_copy": list(SHARED_FILES),
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "--hypothesis-seed=0", f"--ignore={SLOW_TESTS}"],
        "pytest_add_cli_args_test_selection": list(TESTS),
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    text = (REPOSITORY / "pyproject.toml").read_text() + "\n".join(["\n[tool.mutmut]", *lines, ""])
    (SCRATCH / "pyproject.toml").write_text(text)


def _run_mutmut(*arguments: str) -> None:
    command = [Path(sys.executable).with_name("mutmut"), *arguments]
    with LOG.open("w") as log:
        code = subprocess.run(command, cwd=SCRATCH, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"mutmut ended with code {code}; its output is in {LOG}")


def _read_results() -> dict[str, str]:
    """Return the status of each mutant."""
    command = [Path(sys.executable).with_name("mutmut"), "results", "--all", "true"]
    output = subprocess.run(command, cwd=SCRATCH, check=True, capture_output=True, text=True).stdout
    pairs = (line.split(": ", 1) for line in output.splitlines() if ": " in line)
    return {name.strip(): status for name, status in pairs}


def _table(results: dict[str, str]) -> list[str]:
    """Return one line per module and one for all: killed mutants, all mutants, share."""
    counts: dict[str, Counter[str]] = {}
    for name, status in results.items():
        module = name.partition(".x")[0].removeprefix("longhaul.")
        counts.setdefault(module, Counter())[status] += 1
    total = sum(counts.values(), Counter())
    lines = [_line(module, count) for module, count in sorted(counts.items())]
    return [f"{'module':40}{'killed':>8}{'all':>8}{'score':>9}", *lines, _line("total", total)]


def _line(name: str, count: Counter[str]) -> str:
    killed, mutants = sum(count[status] for status in KILLED), count.total()
    return f"{name:40}{killed:8,}{mutants:8,}{100 * killed / mutants:8.1f}%"


def _facts(minutes: float) -> list[str]:
    return [f"date: {date.today()}, {minutes:.0f} min", f"aim: at least {AIM:g} % of all mutants are killed"]


def _show_survivors(results: dict[str, str]) -> None:
    for name, status in results.items():
        if status not in KILLED:
            _run_mutmut("show", name)


if __name__ == "__main__":
    main()
