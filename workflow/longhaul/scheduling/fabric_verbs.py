"""Registers the verb `longhaul fabric explain` with its options; other modules do the work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at the network between the ranks.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `explain` a verb of its own, although it is the only one."""


@app.command()
def explain(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="The run's YAML file, or `demo` for the demo that longhaul ships.")
    ],
) -> None:
    """Show each environment variable of a training: its value, where the value comes from, and why; also what NCCL decides.

    A variable that the shell has set keeps its value, unless the site file names another one.

    Example: `longhaul fabric explain mine.yaml`
    """
    from longhaul.planning.load_plan import load_plan
    from longhaul.report.explain_environment_variables import print_explained_variables
    from longhaul.runtime.rdma_variables import active_ports

    print_explained_variables(load_plan(config), os.environ, active_ports())
