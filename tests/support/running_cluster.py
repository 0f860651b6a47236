"""A test cluster that exists during a `with` block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.slurm_conf import ClusterSize
from tests.support.virtual_cluster import VirtualCluster, missing_programs


@contextmanager
def running_cluster(folder: Path, size: ClusterSize) -> Iterator[VirtualCluster]:
    """Start a cluster and end it after the block; print the end of Slurm's logs if the block fails.

    Skip the test if Slurm or the right to create namespaces is missing.
    """
    if missing := missing_programs(size.accounting):
        pytest.skip(f"not installed: {', '.join(missing)} (make test-packages)")
    if os.geteuid() != 0:
        pytest.skip("a cluster needs root, to create namespaces for its hosts")
    cluster = VirtualCluster(folder, size)
    cluster.up(dies_with_caller=True)
    try:
        yield cluster
    except BaseException:
        print(cluster.ends_of_logs())
        raise
    finally:
        cluster.down()
