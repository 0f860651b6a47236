"""`longhaul run`: checks the config, takes the run's lease, then replaces this process with Snakemake."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from longhaul.artifacts.leases import RunLease
from longhaul.artifacts.paths import RESULTS, RunPaths
from longhaul.config.load_config import load_config
from longhaul.config.shipped_files import data_root
from longhaul.errors import UserError
from longhaul.scheduling import slurm_client
from longhaul.scheduling.snakemake_main import LEASE_OPTION, NEW_FOLDER_OPTION

STARTS_NO_JOB = (
    *(
        "--archive",
        "--cleanup-metadata",
        "--cleanup-shadow",
        "--cm",
        "--conda-cleanup-envs",
        "--conda-create-envs-only",
    ),
    *(
        "--container-cleanup-images",
        "--containerize",
        "--d3dag",
        "--dag",
        "--delete-all-output",
        "--delete-temp-output",
    ),
    *("--detailed-summary", "-D", "--dry-run", "--dryrun", "--filegraph", "--generate-unit-tests", "--help", "-h"),
    *("--lc", "--li", "--lint", "--list-changes", "--list-conda-envs", "--list-input-changes", "--list-params-changes"),
    *("--list-rules", "--list", "-l", "--list-target-rules", "--list-untracked", "--lp", "--lt", "--lu"),
    *("--print-compilation", "--report", "--rulegraph", "--summary", "-S", "--unlock", "--version", "-v"),
)
"""Options with which Snakemake starts no job of the run. Such a call needs no lease."""
_DRY_RUN = re.compile(r"-[a-zA-Z]*n.*")
"""-n alone, or together with other letters: -np, -nj4. Where a value has the n (-dnew), Snakemake takes the lease itself."""


def start_snakemake(config: Path, options: list[str]) -> NoReturn:
    """Start Snakemake with the profile that fits the site's scheduler, unless the user's options name one.

    Raises:
        UserError: the config or its site file is invalid, or the options name a second config.
        SystemExit: another process works on the run.
    """
    if named := [word for word in options if word.startswith("--configfile")]:
        raise UserError(f"{named[0]} names a second config", f"drop it: {config} is the run's only config file")
    # Snakemake ends in a traceback where its --configfile is no readable YAML file.
    loaded = load_config(config)
    lease = _take_lease(config, loaded.config.run, _working_folder(options)) if _starts_jobs(options) else []
    if not any(word.startswith("--profile") for word in options):
        options = [*options, "--profile", str(data_root() / "profiles" / loaded.site.scheduler)]
    # --configfile takes every word up to the next option, so it goes before the user's words, which may begin with a target.
    own = [*lease, "--configfile", str(config.absolute()), "--snakefile", str(data_root() / "Snakefile")]
    os.execv(sys.executable, [sys.executable, "-m", "longhaul.scheduling.snakemake_main", *own, *options])  # nosec B606  # the user's own words, without a shell


def _starts_jobs(options: list[str]) -> bool:
    return not any(word.partition("=")[0] in STARTS_NO_JOB or _DRY_RUN.fullmatch(word) for word in options)


def _working_folder(options: list[str]) -> Path:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--directory", "-d", type=Path, default=Path())
    return parser.parse_known_args(options)[0].directory


def _take_lease(config: Path, run: str, folder: Path) -> list[str]:
    """Take the lease and say that the run starts: Snakemake says nothing for seconds. Return words for Snakemake's process.

    Snakemake takes the lease itself where this cannot: where a profile of the user names another working folder, or where no
    file can be written, for which the Snakefile has the remedy.
    """
    lease = RunLease(RunPaths(run, folder / RESULTS).lease)
    try:
        lease.acquire_or_exit(slurm_client.job_has_ended)
    except OSError:
        return []
    log = folder / ".snakemake" / "log"
    print(
        f"Run {run} starts: config {config}, log of Snakemake in {log}",
        file=sys.stderr,
        flush=True,
    )
    return [NEW_FOLDER_OPTION if lease.made_folder else LEASE_OPTION, str(lease.path)]
