"""PowerSGD on one rank, in a process of its own, as gloo's threads do not survive a group that a test destroys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_reduction_on_one_rank():
    file = Path(__file__).parents[2] / "support" / "one_rank_powersgd.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
