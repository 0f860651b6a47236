"""Copies what `longhaul doctor` reads of a faulted run into tests/unit/report/recorded_faults, for a test without a cluster.

python -m tests.faults.record_fault RUN_FOLDER...   where make faults left the runs: pytest's --basetemp
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from tests.support.chain import REPOSITORY

RECORDED = REPOSITORY / "tests" / "unit" / "report" / "recorded_faults"
RECORDS = ("history.jsonl", "state.json", "failure.json")
_ORDINARY = re.compile(r"step \d+/\d+|saved step|[━─│]|^(\d+: )?\s*$|\[rank\d+\]:|socket\.cpp")
"""Lines that no test needs: progress, tables, and tracebacks of ranks."""


def record(run: Path) -> None:
    """Copy the records and the logs of the stage of one run, without ordinary lines."""
    stage, out = run / "results/tiny/stages/base", RECORDED / run.name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in RECORDS:
        if (stage / name).exists():
            shutil.copy(stage / name, out / name)
    for log in (run / "results/tiny/logs/train/base").glob("attempt-*.log"):
        _copy(log, out / log.name, run)
    for log in (run / ".snakemake/slurm_logs").rglob("*.log"):
        _copy(log, out / f"sbatch-{log.name}", run)


def _copy(log: Path, copy: Path, run: Path) -> None:
    """Copy a log without ordinary lines, and without folders of this machine."""
    text = (
        log.read_text(errors="replace").replace(str(run), "/scratch/my-run").replace(str(REPOSITORY), "/opt/longhaul")
    )
    copy.write_text("".join(f"{line[:300]}\n" for line in text.splitlines() if not _ORDINARY.search(line)))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        record(Path(name))
