"""Copies what `longhaul doctor` reads of a faulted run into tests/unit/report/recorded_faults, for a test without a cluster.

python -m tests.faults.record_fault RUN_FOLDER JOB   JOB: the faulted job's folder in the run, such as stages/base
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from tests.support.pipeline_run import REPOSITORY

RECORDED = REPOSITORY / "tests" / "unit" / "report" / "recorded_faults"
RECORDS = ("history.jsonl", "state.json", "failure.json")
_ORDINARY = re.compile(
    r"Command|Snakefile|Base directory|CalledProcessError|step \d+/\d+|saved step|[━─│]|^(\d+: )?\s*$|\[rank\d+\]:|"
    r"socket\.cpp"
)
"""Lines that no test needs: progress, tables, tracebacks of ranks, and where Snakemake is installed."""


def record(run: Path, job: str) -> None:
    """Copy the records and the logs of one job of a run, without ordinary lines."""
    folder, out = run / "results/tiny" / job, RECORDED / run.name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in RECORDS:
        if (folder / name).exists():
            shutil.copy(folder / name, out / name)
    kind, _, names = "train-base".partition("-") if job == "stages/base" else folder.name.partition("-")
    for log in (run / "results/tiny/logs" / kind / names).glob("attempt-*.log"):
        _copy(log, out / log.name, run)
    for log in (run / ".snakemake/slurm_logs").glob(f"rule_{kind}/**/*.log"):
        _copy(log, out / f"sbatch-{log.name}", run)


def _copy(log: Path, copy: Path, run: Path) -> None:
    """Copy a log without ordinary lines, and without folders of this machine."""
    text = (
        log.read_text(errors="replace").replace(str(run), "/scratch/my-run").replace(str(REPOSITORY), "/opt/longhaul")
    )
    copy.write_text("".join(f"{line[:300]}\n" for line in text.splitlines() if not _ORDINARY.search(line)))


if __name__ == "__main__":
    record(Path(sys.argv[1]), sys.argv[2])
