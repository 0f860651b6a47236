"""Several Slurm jobs that encode one dataset write the shards that one job writes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.pipeline_run import PipelineRun, tiny_config
from tests.support.pipeline_run_on_cluster import PipelineRunOnCluster
from tests.support.virtual_cluster import VirtualCluster

MANIFEST = "results/tiny/data/prose.json"


def manifest(chain: PipelineRun) -> dict[str, Any]:
    """Return the manifest without the paths of its sources, which are in the run's own folder."""
    found = chain.read("data/prose.json")
    return {**found, "sources": [{**source, "path": ""} for source in found["sources"]]}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_jobs_write_the_shards_of_one_local_job(cluster: VirtualCluster, tmp_path: Path):
    config = tiny_config()
    config["datasets"]["prose"]["chunk_mb"] = 0.005
    local = PipelineRun(tmp_path / "local", config)
    local.run(MANIFEST)
    on_cluster = PipelineRunOnCluster(tmp_path / "cluster", {**config, "data_jobs": {"prose": 2}}, cluster)
    output = on_cluster.run(MANIFEST, timeout_s=250)
    assert manifest(on_cluster) == manifest(local)
    assert all(
        f"{name} submitted" in output for name in ("index_sources-prose", "encode-prose-1-of-2", "tokenize-prose")
    )
    chunks = len(list(on_cluster.results.glob("data/prose/*/record.json")))
    assert chunks >= 2 and f"{chunks} of {chunks} chunks exist already" in on_cluster.logs()
    assert all((on_cluster.results / f"logs/encode/prose-{partition}-of-2.log").exists() for partition in (1, 2))
