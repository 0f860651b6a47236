"""A cluster for the length of a block, ended whatever happens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.slurm_conf import Shape
from tests.support.virtual_cluster import VirtualCluster, missing_programs


@contextmanager
def running(folder: Path, shape: Shape) -> Iterator[VirtualCluster]:
    """Skips the test where Slurm or the rights for namespaces are missing; `make test` says so beforehand."""
    if missing := missing_programs(shape.accounting):
        pytest.skip(f"not installed: {', '.join(missing)} (make test-packages)")
    if os.geteuid() != 0:
        pytest.skip("a cluster needs root, for its hosts' namespaces")
    cluster = VirtualCluster(folder, shape)
    cluster.up(dies_with_caller=True)
    try:
        yield cluster
    finally:
        cluster.down()
