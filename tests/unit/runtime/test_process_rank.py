"""The rank of a process, and the refusal of a job of another size than planned."""

from __future__ import annotations

import pytest

from longhaul.errors import UserError
from longhaul.runtime.process_rank import Rank, require_planned_size, this_rank

SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NNODES": "2"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (SRUN, (5, 8, 1, 2)),
        (TORCHRUN, (3, 4, 1, 2)),
        ({**TORCHRUN, **SRUN}, (5, 8, 1, 2)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, (0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (0, 1, 0, 1)),
        ({}, (0, 1, 0, 1)),
    ],
    ids=[
        *("srun task", "torchrun", "srun task with torchrun's variables", "batch script"),
        *("PyTorchJob of Kubernetes", "single process"),
    ],
)
def test_rank_is_read_from_srun_then_torchrun(environ: dict[str, str], expected: tuple[int, ...]):
    rank = this_rank(environ)
    assert (rank.rank, rank.world_size, rank.local_rank, rank.nodes) == expected
    assert rank.is_main == (expected[0] == 0)


@pytest.mark.parametrize(("world_size", "nodes"), [(8, 2), (4, 1), (16, 2)])
def test_another_size_than_planned_is_refused_until_it_is_that(world_size: int, nodes: int):
    with pytest.raises(UserError, match=f"4 ranks on 2 nodes; the plan says {world_size} ranks on {nodes} nodes"):
        require_planned_size(Rank(0, 4, 0, 2, "n1"), world_size, nodes)
    require_planned_size(Rank(0, world_size, 0, nodes, "n1"), world_size, nodes)
