"""Imports of a rank before it trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_rank_imports_no_tracker_that_it_does_not_use(tmp_path: Path):
    """DeepSpeed's autotuner imports MLflow where it is installed."""
    (tmp_path / "mlflow.py").write_text("print('MLflow was imported')")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}
    begun = (
        "from longhaul.jobs.job_kind import job_kinds\nfrom longhaul.runtime.lean_imports import lean_imports\n"
        "with lean_imports(): job_kinds()['train'].load_entry_point()\n"
    )
    after = "import gc, sys\nassert gc.isenabled() and 'deepspeed.autotuning.autotuner' in sys.modules\nimport mlflow"
    command = [sys.executable, "-c", begun + "print('begun')\n" + after]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n", 1)[0] == "begun" and "MLflow was imported" in done.stdout
