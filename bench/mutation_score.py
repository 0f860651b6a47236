"""Measures how many small faults the unit tests find in the modules that it lists: mutmut changes one expression at a time.

    python -m bench.mutation_score [MODULE ...]     MODULE: a path below workflow/longhaul, for example report/goodput.py

A mutant is killed if one of the unit tests that call its function fails or does not end. Without arguments all modules of MODULES
are measured and bench/results/mutants.txt is written. With arguments the surviving mutants of these modules are shown.
mutmut leaves out docstrings, texts of f-strings, decorated functions (so properties) and everything outside functions.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

import pytest

from bench.machine import REPOSITORY, describe_machine, write_result

SCRATCH = REPOSITORY / "build" / "mutants"
LOG = SCRATCH / "mutmut.log"
MUTMUT = Path(sys.executable).with_name("mutmut")
PROCESSES = 2
MODULES = (
    "planning/*.py",
    "scheduling/cancelled_jobs.py",
    "scheduling/deadline_updater.py",
    "scheduling/check_disk_space.py",
    "scheduling/request_at_submission.py",
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
    "tests/unit/artifacts/test_clocks_that_differ_between_hosts.py",
)
SLOW_TESTS = "tests/unit/data/sampling/test_document_isolation.py"
SHARED_FILES = ("Snakefile", "bench", "config", "envs", "profiles", "templates", "tests", "workflow/rules")
"""Files and folders that the tests read, apart from the package."""
KILLED = ("killed", "timeout")
AIM = 85.0


def main() -> None:
    """Run mutmut; write the record, or show the surviving mutants of the named modules."""
    parser = argparse.ArgumentParser(description="Measure how many small faults the unit tests find.")
    parser.add_argument("modules", nargs="*", help="paths below workflow/longhaul; without them all, with a record")
    chosen = parser.parse_args().modules
    start_s = time.monotonic()
    _prepare_scratch(tuple(chosen) or MODULES)
    print(f"mutmut is running; its output is in {LOG}", flush=True)
    _run_mutmut()
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
    package = REPOSITORY / "workflow" / "longhaul"
    if missing := [module for module in modules if not any(package.glob(module))]:
        sys.exit(f"there is no module {', '.join(missing)} in {package}")
    shutil.rmtree(SCRATCH, ignore_errors=True)
    (SCRATCH / "src").mkdir(parents=True)
    (SCRATCH / "src" / "longhaul").symlink_to(package)
    for name in SHARED_FILES:
        (SCRATCH / name).parent.mkdir(exist_ok=True)
        (SCRATCH / name).symlink_to(REPOSITORY / name)
    settings = {
        "source_paths": ["src/longhaul"],
        "only_mutate": [f"src/longhaul/{module}" for module in modules],
        "also_copy": list(SHARED_FILES),
        "pytest_add_cli_args": [
            "-p",
            "bench.mutation_score",
            "-p",
            "no:cacheprovider",
            "--hypothesis-seed=0",
            f"--ignore={SLOW_TESTS}",
        ],
        "pytest_add_cli_args_test_selection": list(TESTS),
        "timeout_multiplier": 6.0,  # a mutant ends after six times the usual duration of its tests plus one second
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    text = (REPOSITORY / "pyproject.toml").read_text() + "\n".join(["\n[tool.mutmut]", *lines, ""])
    (SCRATCH / "pyproject.toml").write_text(text)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the test file of the mutated module first: it kills most mutants, and mutmut stops at the first failure.

    mutmut loads this module as a pytest plugin. MUTANT_UNDER_TEST is "longhaul.<folder>.<module>.x_<function>__mutmut_<n>".
    """
    module = os.environ.get("MUTANT_UNDER_TEST", "").rpartition(".x")[0].rpartition(".")[2]
    items.sort(key=lambda item: item.path.name != f"test_{module}.py")


def _run_mutmut() -> None:
    command = [MUTMUT, "run", "--max-children", str(PROCESSES)]
    with LOG.open("w") as log:
        code = subprocess.run(command, cwd=SCRATCH, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"mutmut ended with code {code}; its output is in {LOG}")


def _output(*arguments: str) -> str:
    return subprocess.run([MUTMUT, *arguments], cwd=SCRATCH, check=True, capture_output=True, text=True).stdout


def _read_results() -> dict[str, str]:
    """Return the status of each mutant."""
    pairs = (line.split(": ", 1) for line in _output("results", "--all", "true").splitlines() if ": " in line)
    return {name.strip(): status for name, status in pairs}


def _table(results: dict[str, str]) -> list[str]:
    """Return one line per module and one for all: killed mutants, all mutants, share."""
    counts: dict[str, Counter[str]] = {}
    for name, status in results.items():
        module = name.rpartition(".")[0].removeprefix("longhaul.")
        counts.setdefault(module, Counter())[status] += 1
    total = sum(counts.values(), Counter())
    lines = [_line(module, count) for module, count in sorted(counts.items())]
    return [f"{'module':40}{'killed':>8}{'all':>8}{'score':>9}", *lines, _line("total", total)]


def _line(name: str, count: Counter[str]) -> str:
    killed, mutants = sum(count[status] for status in KILLED), count.total()
    return f"{name:40}{killed:8,}{mutants:8,}{100 * killed / mutants:8.1f}%"


def _facts(minutes: float) -> list[str]:
    return [
        f"{date.today()}, {minutes:.0f} min with {PROCESSES} processes; all mutants, no sample",
        f"aim: the unit tests kill at least {AIM:g}% of all mutants",
    ]


def _show_survivors(results: dict[str, str]) -> None:
    for name, status in results.items():
        if status not in KILLED:
            print(_output("show", name))


if __name__ == "__main__":
    main()
