"""Render the stage of every <case>/run.yaml beside it: python -m tests.golden.regenerate (make generate)."""

from __future__ import annotations

import sys
from pathlib import Path

from longhaul.artifacts.atomic_files import write_text
from longhaul.artifacts.paths import JobId
from longhaul.config.load_config import load_config
from longhaul.jobs.launch_files import render_job
from longhaul.planning import build_plan
from tests.support.chain import REPOSITORY

GOLDEN = Path(__file__).parent
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/run.yaml"))
SHOWN = ("launch.sh", "launch.json", "job.sbatch", "ds_config.json")


def rendered(case: str) -> dict[str, str]:
    """Return file name -> text of the case's stage, as if run in /scratch/my-run from a checkout in /opt/longhaul."""
    plan = build_plan(load_config(GOLDEN / case / "run.yaml"))
    files = render_job(plan, JobId("train", ("main",)), Path("/scratch/my-run")).files
    # The interpreter first: it may be below the checkout.
    places = {sys.executable: "/opt/venv/bin/python", str(REPOSITORY): "/opt/longhaul"}
    texts = {name: files[name] for name in SHOWN if name in files}
    for place, written in places.items():
        texts = {name: text.replace(place, written) for name, text in texts.items()}
    return texts


if __name__ == "__main__":
    for case in CASES:
        for name, text in rendered(case).items():
            write_text(GOLDEN / case / name, text)
