"""Faults of the network and of hosts that the fabric check must find on the test cluster, and the job that runs into them.

Links have a rate limit, so that the rate does not depend on the CPU of the machine, which all hosts share.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from longhaul.artifacts.artifact_schemas import failed_path
from longhaul.artifacts.fabric_report import FabricReport
from longhaul.artifacts.paths import QUARANTINE, JobFolder, JobId
from longhaul.artifacts.quarantine import read_quarantine
from longhaul.config.load_config import load_config
from longhaul.jobs.launch_files import write_launch_files
from longhaul.planning import build_plan
from tests.support.pipeline_run import tiny_config
from tests.support.pipeline_run_on_cluster import SITE, PipelineRunOnCluster
from tests.support.virtual_cluster import VirtualCluster

RATE = "rate 400mbit burst 256kb limit 1mb"
SLOW = "rate 40mbit burst 32kb limit 1mb"
LOSSY = "rate 400mbit burst 4kb limit 6kb"
"""A queue of four packets: the sender loses packets in every burst."""
FOUND_WITHIN_S = 120.0


@dataclass(frozen=True)
class DrillCase:
    """One fault. `inject` is a context manager in which the fault exists.

    named:       the host that must be quarantined; "" if the fault is no host's
    message:     part of a problem that the check must report; "" if it must find none
    """

    name: str
    inject: Callable[[VirtualCluster], Any]
    named: str = ""
    message: str = ""
    quick: bool = False


@contextmanager
def healthy(cluster: VirtualCluster) -> Iterator[None]:
    yield


def limited(host: str, bucket: str) -> Callable[[VirtualCluster], Any]:
    """Return the fault of a host whose outgoing link has another token bucket."""

    @contextmanager
    def inject(cluster: VirtualCluster) -> Iterator[None]:
        limit_link(cluster, host, bucket)
        try:
            yield
        finally:
            limit_link(cluster, host, RATE)

    return inject


def limit_link(cluster: VirtualCluster, host: str, bucket: str, device: str = "eth0") -> None:
    cluster.run("tc", "qdisc", "replace", "dev", device, "root", "tbf", *bucket.split(), host=host)


def slow_link(first: str, second: str) -> Callable[[VirtualCluster], Any]:
    """Return the fault of one link: a cable of its own, with a tenth of the rate, joins the two hosts."""

    @contextmanager
    def inject(cluster: VirtualCluster) -> Iterator[None]:
        target = cluster.init_process(second)
        assert target is not None
        words = ["link", "add", "eth1", "type", "veth", "peer", "name", "eth1", "netns", str(target.pid)]
        cluster.ip_on(first, *words)
        try:
            for host, other in ((first, second), (second, first)):
                cluster.run("ip", "link", "set", "eth1", "up", host=host)
                cluster.run("ip", "route", "add", f"{cluster.address(other)}/32", "dev", "eth1", host=host)
                limit_link(cluster, host, SLOW, "eth1")
            yield
        finally:
            cluster.run("ip", "link", "delete", "eth1", host=first)

    return inject


def without_cpu(host: str, runs_s: float = 0.002, stops_s: float = 0.06) -> Callable[[VirtualCluster], Any]:
    """Return the fault of a host whose processes run for 2 ms and then stop for 60 ms, and so on."""

    @contextmanager
    def inject(cluster: VirtualCluster) -> Iterator[None]:
        def slow_down(ended: threading.Event) -> None:
            while not ended.is_set():
                ranks = _ranks_on(cluster, host)
                for _ in range(30 if ranks else 1):
                    _pause(ranks, stops_s)
                    time.sleep(runs_s if ranks else 0.2)

        with _in_background(slow_down):
            yield

    return inject


@contextmanager
def _in_background(action: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `action` in a thread during the block. It ends when its event is set."""
    ended = threading.Event()
    thread = threading.Thread(target=action, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _pause(processes: list[psutil.Process], seconds: float) -> None:
    with suppress(psutil.NoSuchProcess):
        for process in processes:
            process.suspend()
    time.sleep(seconds)
    with suppress(psutil.NoSuchProcess):
        for process in processes:
            process.resume()


def _ranks_on(cluster: VirtualCluster, host: str) -> list[psutil.Process]:
    init = cluster.init_process(host)
    try:
        return [
            child
            for child in (init.children(recursive=True) if init else ())
            if "fabric" in child.cmdline() and "python" in child.cmdline()[0]
        ]
    except (psutil.NoSuchProcess, IndexError):
        return []


def unplugged(host: str) -> Callable[[VirtualCluster], Any]:
    """Return the fault of a host that loses its link as soon as a rank runs there. Slurm would not choose it without a link."""

    @contextmanager
    def inject(cluster: VirtualCluster) -> Iterator[None]:
        def unplug(ended: threading.Event) -> None:
            while not ended.wait(0.2):
                if _ranks_on(cluster, host):
                    cluster.unplug(host)
                    return

        try:
            with _in_background(unplug):
                yield
        finally:
            cluster.plug(host)

    return inject


CASES = (
    DrillCase("healthy", healthy),
    DrillCase("one host at a tenth of the rate", limited("n3", SLOW), "n3", "n3 is slow with most other nodes", True),
    DrillCase("one link at a tenth of the rate", slow_link("n2", "n4"), "", "the link between n2 and n4 is slow"),
    DrillCase("one host that loses packets", limited("n4", LOSSY), "n4", "n4 is slow with most other nodes"),
    DrillCase("one host without a CPU", without_cpu("n2"), "n2", "n2 is slow with most other nodes"),
    DrillCase("one host without a link", unplugged("n3"), "n3"),
)


@dataclass(frozen=True)
class DrillResult:
    """seconds: until the fault was found, or until the check succeeded."""

    seconds: float
    quarantined: tuple[str, ...]
    problems: list[str]
    passed_on: list[str]


class FabricDrill(PipelineRunOnCluster):
    """A run of which only the fabric check is started, by hand, on this number of nodes of the cluster."""

    def __init__(self, folder: Path, cluster: VirtualCluster, nodes: int) -> None:
        config = tiny_config(checks={"nodes": nodes, "gpus_per_node": 1, "minutes": 5})
        partition = {**SITE["partitions"][0], "max_nodes": nodes, "max_minutes": 10}
        super().__init__(folder, config, cluster, partitions=[partition], deadline_poll_interval_s=1.0)
        plan = build_plan(load_config(folder / "run.yaml"))
        write_launch_files(plan, folder)
        self._job = JobFolder(folder / plan.paths.job(JobId("fabric")).path)
        self._out = folder / plan.paths.fabric

    def run_check(self) -> DrillResult:
        """Submit the check and wait until it has found the fault and ended, or run on other nodes."""
        started = time.monotonic()
        self.cluster.run("sbatch", str(self._job.sbatch_script), cwd=self.folder)
        found = (self._out.exists, failed_path(self._out).exists, self._job.failure.exists, self._quarantined)
        self.cluster.wait(300, "the fault is found or the check succeeds", lambda: any(is_so() for is_so in found))
        seconds = time.monotonic() - started
        problems = FabricReport.read(failed_path(self._out)).problems if failed_path(self._out).exists() else []
        self.cluster.wait(300, "the job has ended", lambda: not self.cluster.run("squeue", "-h").strip())
        passed_on = FabricReport.read(self._out).hosts if self._out.exists() else []
        return DrillResult(seconds, self._quarantined(), problems, passed_on)

    def _quarantined(self) -> tuple[str, ...]:
        return read_quarantine(self.folder / QUARANTINE).node_names
