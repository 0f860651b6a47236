"""A cluster of two nodes for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.running_cluster import running_cluster
from tests.support.slurm_conf import ClusterSize
from tests.support.virtual_cluster import VirtualCluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    """Two nodes of 8 cores and 2 fake GPUs, without accounting."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), ClusterSize()) as cluster:
        yield cluster
