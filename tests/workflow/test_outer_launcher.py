"""A run that is started inside of another launcher's process, such as `srun --pty bash`, is the same run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.pipeline_run import PipelineRun, tiny_config

OF_SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
OF_TORCHRUN = {
    **{"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "n7.invalid", "MASTER_PORT": "29500"},
    **{"TORCHELASTIC_USE_AGENT_STORE": "True", "PET_NNODES": "2", "ACCELERATE_USE_DEEPSPEED": "true"},
}


def test_a_local_run_in_the_process_of_another_launcher(tmp_path: Path):
    """The environment check compares its number of processes with the plan, and meets them at MASTER_ADDR."""
    run = PipelineRun(tmp_path, tiny_config())
    done = subprocess.run(
        [sys.executable, "-m", "longhaul", "run", "run.yaml", "results/tiny/environment.json"],
        cwd=tmp_path,
        env={**run.environment(), **OF_SRUN, **OF_TORCHRUN},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + run.logs()
    assert len(run.read("environment.json")["nodes"]) == 1
