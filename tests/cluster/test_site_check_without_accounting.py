"""`longhaul site check` on a Slurm without accounting, which accepts any account."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.pipeline_run import write_site
from tests.support.pipeline_run_on_cluster import SITE
from tests.support.virtual_cluster import VirtualCluster


def test_an_account_that_slurm_cannot_check_is_named(cluster: VirtualCluster, tmp_path: Path):
    partitions = [{**SITE["partitions"][0], "account": "nobody"}]
    write_site(tmp_path, {**SITE, "partitions": partitions})
    command = cluster.command([sys.executable, "-m", "longhaul", "site", "check", "site.yaml"], cwd=tmp_path)
    environment = VirtualCluster.environment()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    printed = " ".join(done.stdout.replace("│", " ").split())
    assert done.returncode == 0 and "not checked: account nobody." in printed, done.stdout + done.stderr
    assert "could start at" in printed and "Job " not in printed and "no job was submitted" in printed
    assert cluster.run("squeue", "--noheader") == ""
