"""`longhaul run`: checks the config, then replaces this process with Snakemake."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from longhaul.config.load_config import load_config
from longhaul.config.shipped_files import data_root
from longhaul.errors import UserError


def start_snakemake(config: Path, options: list[str]) -> NoReturn:
    """Start Snakemake with the profile that fits the site's scheduler, unless the user's options name one.

    Raises:
        UserError: the config or its site file is invalid, or the options name a second config.
    """
    if named := [word for word in options if word.startswith("--configfile")]:
        raise UserError(f"{named[0]} names a second config", f"drop it: {config} is the run's only config file")
    # Snakemake ends in a traceback where its --configfile is no readable YAML file.
    site = load_config(config).site
    if not any(word.startswith("--profile") for word in options):
        options = [*options, "--profile", str(data_root() / "profiles" / site.scheduler)]
    # --configfile takes every word up to the next option, so it goes before the user's words, which may begin with a target.
    own = ["--configfile", str(config.absolute()), "--snakefile", str(data_root() / "Snakefile")]
    os.execv(sys.executable, [sys.executable, "-m", "longhaul.scheduling.run_snakemake", *own, *options])  # nosec B606  # the user's own words, without a shell
