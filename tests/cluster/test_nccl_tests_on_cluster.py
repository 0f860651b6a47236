"""The fabric job on two nodes of a virtual cluster: srun of the job's first node starts the programs of nccl-tests on both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from longhaul.artifacts.paths import JobId
from longhaul.config.load_config import load_config
from longhaul.jobs.launch_files import write_job_files
from longhaul.planning import build_plan
from tests.support.fake_nccl_tests import write_programs
from tests.support.pipeline_run_on_cluster import SITE
from tests.support.small_configs import write_config
from tests.support.virtual_cluster import VirtualCluster
from tests.support.wait import wait_for

pytestmark = pytest.mark.slow

AS_WITH_MPI = """
os.environ["FAKE_MPI_RANKS"] = os.environ["SLURM_NTASKS"]
sys.exit(main(sys.argv) if os.environ["SLURM_PROCID"] == "0" else 0)
"""


def test_srun_starts_a_process_of_each_program_for_each_rank(tmp_path: Path, cluster: VirtualCluster):
    programs = write_programs(tmp_path / "build", does=AS_WITH_MPI)
    config = write_config(tmp_path, {"checks": {"nodes": 2, "gpus_per_node": 2}, "stages.0.nodes": 2})
    interconnect = {**SITE.get("interconnect", {}), "nccl_tests": str(programs)}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**SITE, "interconnect": interconnect}))
    plan = build_plan(load_config(config))
    folder = write_job_files(plan, JobId("fabric"), tmp_path)
    cluster.run("sbatch", str(folder.sbatch_script), cwd=tmp_path)
    wait_for(lambda: not cluster.run("squeue", "-h").strip(), 300)
    log = "".join(path.read_text() for path in sorted((tmp_path / "results/small/logs").rglob("*.log")))
    assert (tmp_path / plan.paths.fabric).exists(), log
    report = json.loads((tmp_path / plan.paths.fabric).read_text())
    assert len(report["nccl_tests"]) == 66 and {row["world_size"] for row in report["nccl_tests"]} == {4}
    assert "nccl-tests between 4 ranks" in log
