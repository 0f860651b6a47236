"""Runs Snakemake as `python -m snakemake` does, with a shorter start; `longhaul run` replaces its process with this one."""

from __future__ import annotations

from longhaul.compat.slurm_plugin_imports import import_pandas_when_used
from longhaul.runtime.lean_imports import lean_imports

if __name__ == "__main__":
    import_pandas_when_used()
    with lean_imports():
        from snakemake.cli import main
    main()
