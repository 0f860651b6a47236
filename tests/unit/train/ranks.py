"""Starts a test's own worker file on several ranks, as torchrun does for a stage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def spawn(worker: Path, ranks: int, *arguments: str, timeout_s: float = 180) -> str:
    """Runs `worker` on `ranks` gloo processes with one thread each; returns what they printed."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        str(worker),
        *arguments,
    ]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "TORCHDYNAMO_DISABLE": "1",  # as the trainer has it
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout
