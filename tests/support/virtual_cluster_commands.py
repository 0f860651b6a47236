"""Starts and controls a test cluster: up, down, run, on, kill, boot, unplug, plug, install."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.slurm_conf import CONTROLLER, ClusterSize
from tests.support.virtual_cluster import (
    ACCOUNTING_PACKAGES,
    PACKAGES,
    VirtualCluster,
    missing_programs,
)
from tests.support.virtual_hosts import ClusterError

FOLDER = Path(__file__).resolve().parents[2] / ".cluster"


def main() -> None:
    """Run one verb. A cluster stays up between calls."""
    options = _parser().parse_args()
    try:
        options.run(options)
    except ClusterError as error:
        sys.exit(f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.support.virtual_cluster_commands", description=__doc__)
    verbs = parser.add_subparsers(metavar="verb", required=True)
    up = verbs.add_parser("up", help="start a cluster")
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--accounting", action="store_true", help="with slurmdbd and mariadb")
    up.set_defaults(run=_up)
    verbs.add_parser("down", help="end the cluster").set_defaults(run=lambda _: VirtualCluster(FOLDER).down())
    run = verbs.add_parser("run", help="run a command on the login node: run sinfo")
    run.set_defaults(run=lambda options: _enter(CONTROLLER, options.words))
    on = verbs.add_parser("on", help="run a command on a node: on n1 hostname")
    on.add_argument("node")
    on.set_defaults(run=lambda options: _enter(options.node, options.words))
    for verb in (run, on):
        verb.add_argument("words", nargs=argparse.REMAINDER)
    for name, method in (("kill", "power_off"), ("boot", "boot"), ("unplug", "unplug"), ("plug", "plug")):
        verb = verbs.add_parser(name, help=f"{name} a node")
        verb.add_argument("node")
        verb.set_defaults(run=lambda options, method=method: getattr(VirtualCluster(FOLDER), method)(options.node))
    verbs.add_parser("install", help="install the Debian packages that tests need").set_defaults(
        run=lambda _: _install()
    )
    return parser


def _up(options: argparse.Namespace) -> None:
    if missing := missing_programs(options.accounting):
        raise ClusterError(f"not installed: {', '.join(missing)}; try: make test-packages")
    if os.geteuid() != 0:
        raise ClusterError("a cluster needs root, to create namespaces for its hosts")
    VirtualCluster(FOLDER, ClusterSize(nodes=options.nodes, accounting=options.accounting)).up()
    print(
        f"{options.nodes} nodes are up. Work on the login node: python -m tests.support.virtual_cluster_commands run bash"
    )
    print("its site file is tests/support/cluster_site.yaml; to end it: make cluster-down")


def _enter(host: str, words: list[str]) -> None:
    command = VirtualCluster(FOLDER).command(words or ["bash"], host)
    os.execvpe(command[0], command, VirtualCluster.environment())


def _install() -> None:
    """Install missing packages. Without the rights for it, print which tests will be skipped."""
    packages = []
    if missing_programs(accounting=True):
        packages += [*PACKAGES, *ACCOUNTING_PACKAGES]
    packages += [program for program in ("chromium", "bindfs") if not shutil.which(program)]
    packages += [] if Path("/usr/include/libaio.h").exists() else ["libaio-dev"]
    if not packages:
        return
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("apt-get") or (prefix and not shutil.which("sudo")) or not _apt(prefix, packages):
        skipped = (
            "the Slurm cluster (tests/cluster, tests/faults), a browser (tests/workflow/test_report.py) and cached folders "
            "(tests/recovery/test_shared_file_systems.py); tests of optimizer states on a disk fail without libaio-dev"
        )
        print(f"not installed: {', '.join(packages)}. Skipped: tests of {skipped}. Install them and run again")


def _apt(prefix: list[str], packages: list[str]) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    update, install = ["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]
    commands = [[*prefix, *update], [*prefix, *install, *packages]]
    for command in commands:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print("\n".join((done.stdout + done.stderr).splitlines()[-5:]), file=sys.stderr)
            return False
    return True


if __name__ == "__main__":
    main()
