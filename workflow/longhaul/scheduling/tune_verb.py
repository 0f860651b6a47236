"""Defines the verb `longhaul tune`; report/tuning_table.py makes its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tune(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="The run's YAML file, or `demo` for the demo that longhaul ships.")
    ],
) -> None:
    """Print the micro batches and kinds of recomputation of each stage, with the memory that they need. Starts nothing.

    Example: `longhaul tune mine.yaml`
    """
    from longhaul.planning.load_plan import load_plan
    from longhaul.report.tuning_table import print_tuning_tables

    print_tuning_tables(load_plan(config))
