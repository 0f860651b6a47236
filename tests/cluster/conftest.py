"""A cluster of two nodes for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from running import running
from slurm_conf import Shape
from virtual_cluster import VirtualCluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    """Two nodes of 8 cores and 2 fake GPUs, without accounting."""
    with running(tmp_path_factory.mktemp("cluster"), Shape()) as cluster:
        yield cluster
