"""Throughput of longhaul's training step compared with a bare deepspeed.initialize loop and a bare PyTorch loop.

All three train the demo's pretraining stage in turns, in the same processes: same model, micro batch, accumulation and world
size. longhaul reads its data, reduces its loss, examines each step and writes its metrics. The bare loops repeat one batch in
memory.
"""

from __future__ import annotations

import os
import subprocess
import sys

from bench.machine import MODULE_PATH, REPOSITORY
from longhaul.artifacts.paths import RunPaths

FOLDER = REPOSITORY / "build" / "bench-trainer"
DATA = str(RunPaths("demo").manifest("stdlib"))
PROCESSES = 2


def main() -> None:
    """Tokenize the demo's data once, then start bench/trainer_worker.py in two processes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    snakemake = [sys.executable, "-m", "snakemake", "-s", str(REPOSITORY / "Snakefile"), "--directory", str(FOLDER)]
    subprocess.run(
        [*snakemake, "--profile", str(REPOSITORY / "profiles" / "local"), "--quiet", "all", "--", DATA], check=True
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    threads = str(max(1, (os.cpu_count() or 1) // PROCESSES))
    environment = {
        **os.environ,
        **MODULE_PATH,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": threads,
        "PYTHONWARNINGS": "ignore",
    }
    command = [*torchrun, "-m", "bench.trainer_worker", str(RunPaths("demo").stage("pretrain").job_spec)]
    subprocess.run(command, check=True, cwd=FOLDER, env=environment)


if __name__ == "__main__":
    main()
