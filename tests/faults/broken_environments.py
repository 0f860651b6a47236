"""Breaks what a run needs from its machines: disks, clocks, names of hosts. Each function has one that repairs it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.faulted_run import FaultedRun, faulted_site
from tests.support.pipeline_run import write_site
from tests.support.pipeline_run_on_cluster import SITE

SMALL = "small"
"""Folder of a run for the weights of its stage."""
EXPORTS = "results/tiny/export"


def fill_disk(mount: str, left_bytes: int = 65536) -> Callable[[FaultedRun], None]:
    """Return a function that fills the small file system at `mount`, a folder of the run, apart from `left_bytes`."""

    def fill(run: FaultedRun) -> None:
        root = run.folder / mount
        free = shutil.disk_usage(root).free
        with (root / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, free - left_bytes)

    return fill


def free_disk(mount: str) -> Callable[[FaultedRun], None]:
    return lambda run: (run.folder / mount / "ballast").unlink()


def seal_disk(run: FaultedRun) -> None:
    """Make the file system of the weights read-only. File modes cannot be used: they do not restrict root."""
    subprocess.run(["mount", "-o", "remount,ro", str(run.folder / SMALL)], check=True)


def unseal_disk(run: FaultedRun) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(run.folder / SMALL)], check=True)


def set_clock_wrong(run: FaultedRun) -> None:
    """Let the clock of the second node be an hour ahead."""
    wrong = _wrong_clock(run)
    _change_site(run, faulted_site(WRONG_CLOCK=str(wrong)))
    wrong.touch()


def set_clock_right(run: FaultedRun) -> None:
    _wrong_clock(run).unlink()


def hide_host_names(run: FaultedRun) -> None:
    run.cluster.write_host_names(known=False)


def use_addresses(run: FaultedRun) -> None:
    """Follow the remedy: ranks meet at the address of an interface."""
    _change_site(run, {"interconnect": {**SITE["interconnect"], "master_address": {"interface": "eth0"}}})


def _wrong_clock(run: FaultedRun) -> Path:
    return run.folder / "wrong-clock"


def _change_site(run: FaultedRun, changes: dict[str, Any]) -> None:
    write_site(run.folder, {**SITE, **faulted_site(), **changes})
