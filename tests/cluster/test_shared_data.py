"""Jobs that share a dataset's units, through Slurm: they make what one job makes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.chain import Chain, tiny_config
from tests.support.cluster_chain import ClusterChain
from tests.support.virtual_cluster import VirtualCluster

MANIFEST = "results/tiny/data/prose.json"


def manifest(chain: Chain) -> dict[str, Any]:
    """Without the paths of its sources, which lie in the chain's own folder."""
    made = chain.read("data/prose.json")
    return {**made, "sources": [{**source, "path": ""} for source in made["sources"]]}


@pytest.mark.timeout(300)
def test_two_jobs_make_what_one_makes_here(cluster: VirtualCluster, tmp_path: Path):
    config = tiny_config()
    config["datasets"]["prose"]["chunk_mb"] = 0.005
    here = Chain(tmp_path / "here", config)
    here.run(MANIFEST)
    there = ClusterChain(tmp_path / "there", {**config, "data_jobs": {"prose": 2}}, cluster)
    output = there.run(MANIFEST, timeout_s=250)
    assert manifest(there) == manifest(here)
    assert all(f"rule {rule}:" in output for rule in ("survey", "encode", "tokenize"))
    units = len(list(there.results.glob("data/prose/*/record.json")))
    assert units >= 2 and f"{units} of {units} units are there" in there.logs()
    assert all((there.results / f"logs/encode/prose-{share}-of-2.log").exists() for share in (1, 2))
