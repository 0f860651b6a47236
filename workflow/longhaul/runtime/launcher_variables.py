"""Names the environment variables of launchers such as torchrun, and removes what an outer launcher has left: RANK, WORLD_SIZE.

A shell inside of `srun --pty`, torchrun, mpirun or a Kubernetes PyTorchJob has such variables. A process that inherits them would
take itself for one of several, wait for them, or look for rank 0 on another host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

_OF_LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    # torchrun; it reads PET_*, such as PET_NNODES, as options
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "TORCHELASTIC_*", "PET_*"),
    # deepspeed and accelerate
    *("LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "ACCELERATE_*"),
    # MPI; Cray's srun sets some of them, too
    *("PMI_RANK", "PMI_SIZE", "PMIX_RANK", "PALS_LOCAL_RANKID", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    *("OMPI_COMM_WORLD_*", "MV2_COMM_WORLD_*"),
)
_OF_SRUN = (
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_GTIDS", "SLURM_TASK_PID", "SLURM_STEP*"),
    *("SLURM_NTASKS*", "SLURM_NPROCS", "SLURM_TASKS_PER_NODE", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
    *("SLURM_NODELIST", "SLURM_JOB_NODELIST"),
)
"""Rank, size and nodes. SLURM_JOB_ID, by which others see that this process has ended, and SLURM_CONF are not among them."""


def launcher_variables(names: Iterable[str]) -> list[str]:
    """Return those of these names that a launcher other than srun sets for each process."""
    return _matching(names, _OF_LAUNCHERS)


def srun_variables(names: Iterable[str]) -> list[str]:
    """Return those of these names that srun sets for each process."""
    return _matching(names, _OF_SRUN)


def without_launcher(environ: Mapping[str, str], slurm: bool) -> dict[str, str]:
    """Return an environment without the variables of an outer launcher.

    slurm: srun starts the processes and sets its own variables; else those of an outer srun are removed, too
    """
    removed = {*launcher_variables(environ), *([] if slurm else srun_variables(environ))}
    return {name: value for name, value in environ.items() if name not in removed}


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
