"""Renders the stage of every <case>/run.yaml beside it: python tests/golden/regenerate.py (make generate)."""

from __future__ import annotations

import sys
from pathlib import Path

from longhaul.artifacts.files import write_text
from longhaul.config.load import load_config
from longhaul.jobs.launch_files import REPOSITORY, render_stage
from longhaul.planning import make_plan

GOLDEN = Path(__file__).parent
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/run.yaml"))
SHOWN = ("launch.sh", "launch.json", "job.sbatch", "ds_config.json")


def rendered(case: str) -> dict[str, str]:
    """File name -> text of the case's stage, as if run below /scratch/my-run from a checkout in /opt/longhaul."""
    plan = make_plan(load_config(GOLDEN / case / "run.yaml"))
    files = render_stage(plan, "main", Path("/scratch/my-run")).files
    # the interpreter first: it may lie below the checkout
    places = {sys.executable: "/opt/venv/bin/python", str(REPOSITORY): "/opt/longhaul"}
    texts = {name: files[name] for name in SHOWN if name in files}
    for place, written in places.items():
        texts = {name: text.replace(place, written) for name, text in texts.items()}
    return texts


if __name__ == "__main__":
    for case in CASES:
        for name, text in rendered(case).items():
            write_text(GOLDEN / case / name, text)
