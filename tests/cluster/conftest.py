"""A cluster of two nodes for all tests of this folder, ended with them whatever happens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from virtual_cluster import Shape, VirtualCluster, missing_programs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    """Two nodes of 8 cores and 2 fake GPUs, without accounting."""
    with _running(tmp_path_factory.mktemp("cluster"), Shape()) as running:
        yield running


class _running:
    """A cluster for the length of a block."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        if missing := missing_programs(shape.accounting):
            pytest.skip(f"not installed: {', '.join(missing)} (make test-packages)")
        if os.geteuid() != 0:
            pytest.skip("a cluster needs root, for its hosts' namespaces")
        self.cluster = VirtualCluster(folder, shape)

    def __enter__(self) -> VirtualCluster:
        self.cluster.up(dies_with_caller=True)
        return self.cluster

    def __exit__(self, *_: object) -> None:
        self.cluster.down()
