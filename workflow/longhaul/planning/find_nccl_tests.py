"""Finds the programs of nccl-tests in the folder of `interconnect.nccl_tests`; says before submission what is missing there."""

from __future__ import annotations

import os
from pathlib import Path

from longhaul.config.site_config import Site
from longhaul.errors import UserError

PROGRAMS = {
    "all_reduce": "all_reduce_perf",
    "all_gather": "all_gather_perf",
    "reduce_scatter": "reduce_scatter_perf",
    "all_to_all": "alltoall_perf",
    "broadcast": "broadcast_perf",
    "send_recv": "sendrecv_perf",
}
"""Collective of the fabric check -> program that measures the same (NVIDIA/nccl-tests, src/Makefile)."""


def missing_programs(folder: Path) -> list[str]:
    """Return the programs that are not in the folder, or that this user cannot start."""
    return [
        name for name in PROGRAMS.values() if not (folder / name).is_file() or not os.access(folder / name, os.X_OK)
    ]


def missing_text(folder: Path, missing: list[str]) -> str:
    return f"{folder} has no program {', '.join(missing)} that this user can start"


def check_nccl_tests(site: Site) -> None:
    """Raise UserError if this machine has the folder or runs the jobs itself, and a program is missing."""
    if not site.interconnect.nccl_tests or nccl_tests_warning(site):
        return
    folder = Path(site.interconnect.nccl_tests)
    if missing := missing_programs(folder):
        raise UserError(
            f"interconnect.nccl_tests: {missing_text(folder, missing)}",
            "name the folder that `make MPI=1` of nccl-tests writes its programs to, or remove the key",
        )


def nccl_tests_warning(site: Site) -> str | None:
    """Return a warning if the folder is not on this machine, and jobs run on others: only these can say what it holds."""
    folder = site.interconnect.nccl_tests
    if not folder or site.scheduler == "local" or Path(folder).is_dir():
        return None
    return (
        f"interconnect.nccl_tests: {folder} is no folder of this machine; if the nodes do not have it either, the fabric check "
        "fails"
    )
