"""The low-rank reduction on one rank, in a process of its own: gloo's threads do not outlive a group that a test ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_one_rank():
    file = Path(__file__).parents[2] / "support" / "one_rank_powersgd.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
