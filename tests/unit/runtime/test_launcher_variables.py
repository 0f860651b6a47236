"""Variables of an outer launcher are removed from a step's environment; those of the user and of longhaul stay."""

from __future__ import annotations

import pytest

from longhaul.runtime.launcher_variables import without_launcher

OF_LAUNCHERS = {
    **{"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "0", "ROLE_NAME": "x"},
    **{"TORCHELASTIC_USE_AGENT_STORE": "True", "PET_NNODES": "2", "ACCELERATE_USE_FSDP": "true", "CROSS_SIZE": "2"},
    **{"MASTER_ADDR": "n7.invalid", "MASTER_PORT": "1", "PMI_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"},
}
OF_SRUN = {
    **{"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"},
    **{
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_TASKS_PER_NODE": "2(x2)",
    },
}
KEPT = {
    **{"NCCL_DEBUG": "INFO", "TORCH_FR_BUFFER_SIZE": "9", "HF_HOME": "/hf", "OMP_NUM_THREADS": "2", "RANKED": "1"},
    **{"PMI_NO_FORK": "1", "OMPI_MCA_btl": "tcp", "CUDA_VISIBLE_DEVICES": "0"},
    # The owner of a lease is known by its job, and Slurm's commands by the file of their configuration.
    **{"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "SLURM_CONF": "/etc/slurm.conf"},
}


@pytest.mark.parametrize(("slurm", "kept"), [(False, KEPT), (True, KEPT | OF_SRUN)])
def test_variables_of_an_outer_launcher_are_removed(slurm: bool, kept: dict[str, str]):
    assert without_launcher(OF_LAUNCHERS | OF_SRUN | KEPT, slurm) == kept
