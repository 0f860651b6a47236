"""Snakemake whose executor asks Slurm every second. Its usual interval grows to minutes."""

import sys

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

RemoteExecutor.next_seconds_between_status_checks = property(lambda self: 1, lambda self, value: None)  # type: ignore[assignment]

if __name__ == "__main__":
    sys.exit(main())
