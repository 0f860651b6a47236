"""Runs Snakemake as `python -m snakemake` does, with a shorter start; `longhaul run` replaces its process with this one."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

LEASE_OPTION, NEW_FOLDER_OPTION = "--longhaul-lease", "--longhaul-lease-in-new-folder"
"""First word of the command line where this process owns the run's lease, or has also made its folder. The lease's path
follows; Snakemake sees neither.
"""


def is_main_program() -> bool:
    """Return whether `longhaul run` started this process: users who call Snakemake themselves keep its dry run."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == __name__


def _main() -> None:
    from longhaul.artifacts.leases import RunLease
    from longhaul.compat.slurm_plugin_imports import import_pandas_when_used
    from longhaul.runtime.lean_imports import lean_imports

    if sys.argv[1:2] in ([LEASE_OPTION], [NEW_FOLDER_OPTION]):
        lease = RunLease(Path(sys.argv[2]), made_folder=sys.argv[1] == NEW_FOLDER_OPTION)
        lease.acquire_or_exit()  # releases it also where Snakemake ends before it starts a job
        del sys.argv[1:3]
    import_pandas_when_used()
    with lean_imports():
        from snakemake.cli import main
    main()


if __name__ == "__main__":
    try:
        _main()
    except KeyboardInterrupt:  # Snakemake handles it only while jobs run
        print("stopped by Ctrl-C; the same command starts or continues the run", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
