"""The test cluster itself: its hosts are separate, can be unplugged and powered off, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.support.running_cluster import running_cluster
from tests.support.slurm_conf import ClusterSize
from tests.support.virtual_cluster import VirtualCluster
from tests.support.virtual_hosts import ClusterError
from tests.support.wait import wait_for


def test_job_runs_on_both_hosts(cluster: VirtualCluster):
    assert sorted(cluster.run("srun", "--nodes=2", "hostname").split()) == ["n1", "n2"]
    addresses = cluster.run("srun", "--nodes=2", "ip", "-4", "-br", "addr", "show", "eth0")
    assert "10.77.0.11" in addresses and "10.77.0.12" in addresses


def test_fake_gpus_are_allocated(cluster: VirtualCluster):
    shown = cluster.run("srun", "--gpus-per-node=2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert shown.split() == ["0,1"]
    with pytest.raises(ClusterError, match="not available"):
        cluster.run("sbatch", "--test-only", "--gpus-per-node=3", "--wrap=true")


def test_unplugged_and_powered_off_nodes_return(cluster: VirtualCluster):
    def state() -> str:
        return cluster.run("sinfo", "-h", "-N", "-n", "n2", "-p", "main", "-o", "%T").strip()

    def connect() -> None:
        """Connect to slurmd of n2. ping is not installed everywhere."""
        cluster.run("timeout", "2", "bash", "-c", "exec 3<> /dev/tcp/10.77.0.12/6818", timeout_s=10)

    connect()
    cluster.unplug("n2")
    with pytest.raises(ClusterError, match="exit 124"):
        connect()
    cluster.plug("n2")
    connect()
    cluster.power_off("n2")
    with pytest.raises(ClusterError, match="n2 is off"):
        cluster.run("true", host="n2")
    cluster.boot("n2")
    wait_for(lambda: state() == "idle")
    assert cluster.run("srun", "--nodelist=n2", "hostname").strip() == "n2"


def test_a_zombie_that_nobody_reaps_does_not_hold_a_host(tmp_path_factory: pytest.TempPathFactory):
    """A killed `nsenter` leaves its command to PID 1 of this machine. In a container that often reaps nothing."""
    with running_cluster(tmp_path_factory.mktemp("zombie"), ClusterSize(nodes=1)) as cluster:
        nsenter = psutil.Popen(cluster.command(["sleep", "100"], "n1"))
        wait_for(lambda: nsenter.children() and nsenter.children()[0].name() == "sleep")
        command = nsenter.children()[0]
        nsenter.suspend()
        wait_for(lambda: nsenter.status() == psutil.STATUS_STOPPED)
        command.kill()
        wait_for(lambda: command.status() == psutil.STATUS_ZOMBIE)
        cluster.power_off("n1")
        assert not cluster.is_on("n1")
        nsenter.kill()
        nsenter.wait(10)


def descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def test_second_cluster_is_separate_and_leaves_nothing_behind(
    cluster: VirtualCluster, tmp_path_factory: pytest.TempPathFactory
):
    before, folder = descendants(), tmp_path_factory.mktemp("second")
    with running_cluster(folder, ClusterSize(nodes=1)) as second:
        assert second.run("srun", "hostname").strip() == "n1"
        with pytest.raises(ClusterError, match="is up"):
            VirtualCluster(folder).up()
        own = descendants() - before
        assert {process.name() for process in own} >= {"slurmctld", "slurmd", "munged", "sleep", "unshare"}
    assert not folder.exists()
    assert [process for process in own if process.is_running()] == []
    assert cluster.run("sinfo", "-h").strip()


def test_a_folder_whose_sockets_would_have_too_long_paths_is_refused(tmp_path: Path):
    with pytest.raises(ClusterError, match="at most 80, for sockets of jobs"):
        VirtualCluster(tmp_path / ("x" * 80)).up()


def test_accounting_records_a_finished_job(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("accounted")
    with running_cluster(folder, ClusterSize(nodes=1, accounting=True)) as accounted:
        job = accounted.run("sbatch", "--parsable", "--wrap=true", f"--output={folder}/out", cwd=folder).strip()
        state_of_job = ["sacct", "-n", "-X", "-j", job, "-o", "State"]
        wait_for(lambda: accounted.run(*state_of_job).strip() not in ("", "PENDING", "RUNNING"))
        assert accounted.run(*state_of_job).strip() == "COMPLETED"
