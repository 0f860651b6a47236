"""Faults of the network and of hosts that the two checks must find on the test cluster, and the job that runs into them.

Links have a rate limit, so that the rate does not depend on the CPU of the machine, which all hosts share.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from longhaul.artifacts.artifact_schemas import EnvironmentReport, failed_path
from longhaul.artifacts.fabric_report import FabricReport
from longhaul.artifacts.paths import QUARANTINE, STAGE_KIND, JobFolder, JobId
from longhaul.artifacts.quarantine import read_quarantine
from longhaul.config.load_config import load_config
from longhaul.jobs.launch_files import write_launch_files
from longhaul.planning import Plan, build_plan
from tests.cluster.host_faults import (
    Fault,
    full_disk,
    full_shared_memory,
    injected,
    injected_variables,
    other_torch,
    scratch_folder,
)
from tests.support.pipeline_run import REPOSITORY, tiny_config
from tests.support.pipeline_run_on_cluster import SITE, PipelineRunOnCluster
from tests.support.virtual_cluster import VirtualCluster
from tests.support.virtual_hosts import VirtualHosts

RATE = "rate 400mbit burst 256kb limit 1mb"
SLOW = "rate 40mbit burst 4kb limit 1mb"
"""A larger bucket lets half of a short message of the pair tournament pass at full speed after a pause."""
LOSSY = "rate 400mbit burst 2kb limit 3kb"
"""A queue of two packets: the sender loses packets in every burst. Its rate changes from one moment to the next."""
MIN_DISK_GB_PER_S = 0.006
"""Minimum of the local disk, which all hosts of this machine share: a slow host writes at half of it."""
FABRIC, ENVIRONMENT, QUICK_HALF = "fabric", "environment", "quick half"
"""The quick half is what a training runs on its own nodes before its first step: a part of both checks."""
HEALTHY_RUNS = 20


@dataclass(frozen=True)
class DrillCase:
    """One fault.

    check:    the check that must find it; the quick half has healthy runs alone
    inject:   a context manager in which the fault exists
    named:    the host that must be quarantined; "" if the fault is no host's
    message:  part of a problem that the check must report; "" if it must find none
    within_s: most seconds from the submission of the check until the fault is found
    quick:    part of `make test`
    """

    name: str
    inject: Fault
    named: str = ""
    message: str = ""
    check: str = FABRIC
    within_s: float = 120.0
    quick: bool = False


@contextmanager
def healthy(cluster: VirtualHosts) -> Iterator[None]:
    yield


def limited(host: str, bucket: str) -> Fault:
    """Return the fault of a host whose outgoing link has another token bucket."""

    @contextmanager
    def inject(cluster: VirtualHosts) -> Iterator[None]:
        limit_link(cluster, host, bucket)
        try:
            yield
        finally:
            limit_link(cluster, host, RATE)

    return inject


def limit_link(cluster: VirtualHosts, host: str, bucket: str, device: str = "eth0") -> None:
    cluster.run("tc", "qdisc", "replace", "dev", device, "root", "tbf", *bucket.split(), host=host)


def slow_link(first: str, second: str) -> Fault:
    """Return the fault of one link: a cable of its own, with a tenth of the rate, joins the two hosts."""

    @contextmanager
    def inject(cluster: VirtualHosts) -> Iterator[None]:
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


def without_cpu(host: str, check: str, runs_s: float = 0.002, stops_s: float = 0.2) -> Fault:
    """Return the fault of a host whose process of a check runs for 2 ms of 202 ms, once it has joined the others.

    Slowed down earlier, it would import torch for minutes.
    """

    @contextmanager
    def inject(cluster: VirtualHosts) -> Iterator[None]:
        def slow_down(ended: threading.Event) -> None:
            ranks: list[psutil.Process] = []
            while not ended.is_set():
                ranks = [rank for rank in ranks if rank.is_running()] or _ranks_on(cluster, host, check)
                if _have_joined(ranks):
                    _pause(ranks, stops_s)
                    time.sleep(runs_s)
                else:
                    time.sleep(0.02 if ranks else 0.2)

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


def _have_joined(ranks: list[psutil.Process]) -> bool:
    """Return whether a rank has joined the process group: gloo's threads start then."""
    names = (name for rank in ranks for name in Path(f"/proc/{rank.pid}/task").glob("*/comm"))
    with suppress(OSError):  # a thread, or the rank, has ended
        return any(name.read_text().startswith("pt_gloo") for name in names)
    return False


def _pause(processes: list[psutil.Process], seconds: float) -> None:
    with suppress(psutil.NoSuchProcess):
        for process in processes:
            process.suspend()
    time.sleep(seconds)
    with suppress(psutil.NoSuchProcess):
        for process in processes:
            process.resume()


def _ranks_on(cluster: VirtualHosts, host: str, check: str) -> list[psutil.Process]:
    init = cluster.init_process(host)
    ranks = []
    with suppress(psutil.NoSuchProcess):
        for child in init.children(recursive=True) if init else ():
            with suppress(psutil.NoSuchProcess):  # it has ended; a zombie, which a host may keep, is no rank
                words = child.cmdline()
                if check in words and "python" in words[0]:
                    ranks.append(child)
    return ranks


def unplugged(host: str) -> Fault:
    """Return the fault of a host that loses its link as soon as a rank runs there. Slurm would not choose it without a link."""

    @contextmanager
    def inject(cluster: VirtualHosts) -> Iterator[None]:
        def unplug(ended: threading.Event) -> None:
            while not ended.wait(0.2):
                if _ranks_on(cluster, host, FABRIC):
                    cluster.unplug(host)
                    return

        try:
            with _in_background(unplug):
                yield
        finally:
            cluster.plug(host)

    return inject


HEALTHY = tuple(
    DrillCase(f"healthy, {check} check", healthy, check=check) for check in (ENVIRONMENT, FABRIC, QUICK_HALF)
)
_HOST: dict[str, Any] = {"named": "n2", "check": ENVIRONMENT, "within_s": 90.0}
CASES = (
    DrillCase("one host at a tenth of the rate", limited("n3", SLOW), "n3", "n3 is slow with most other nodes", quick=True),
    DrillCase("one link at a tenth of the rate", slow_link("n2", "n4"), "", "the link between n2 and n4 is slow"),
    DrillCase("one host that loses packets", limited("n4", LOSSY), "n4", "and loses packets"),
    DrillCase("one host without a CPU", without_cpu("n2", ENVIRONMENT), "n2", "n2: slowest core of the job",
              check=ENVIRONMENT),
    DrillCase("one host without a link", unplugged("n3"), "n3"),
    DrillCase("one host with a wrong clock", injected("WRONG_CLOCK", "n2"), message="n2: clock is +36", **_HOST, quick=True),
    DrillCase("one host with another torch", other_torch("n2"), message="torch is not the same on all nodes", **_HOST),
    DrillCase("one host with a full disk", full_disk("n2"), message="n2: local disk: No space left", **_HOST),
    DrillCase("one host with a slow disk", injected("SLOW_DISK", "n2"), message="n2: local disk, write", **_HOST),
    DrillCase("one host with a full /dev/shm", full_shared_memory("n2"), message="n2: /dev/shm has 8 MiB free",
              **_HOST, quick=True),
)  # fmt: skip


_REPORTS: dict[str, type[FabricReport | EnvironmentReport]] = {
    FABRIC: FabricReport,
    ENVIRONMENT: EnvironmentReport,
    QUICK_HALF: FabricReport,
}


def _hosts_of(report: FabricReport | EnvironmentReport) -> list[str]:
    return report.hosts if isinstance(report, FabricReport) else [node["host"] for node in report.nodes]


def drill_site(cluster: VirtualHosts, nodes: int) -> dict[str, Any]:
    """Return the keys of a site file of these nodes, into whose jobs the faults of host_faults.py are injected."""
    return {
        "partitions": [{**SITE["partitions"][0], "max_nodes": nodes, "max_minutes": 10}],
        "deadline_poll_interval_s": 1.0,
        "node_minimums": {"disk_write_gb_per_s": MIN_DISK_GB_PER_S},
        "environment": injected_variables(cluster),
        "srun_extra": [f"--task-prolog={REPOSITORY / 'tests/support/injected/task_prolog.sh'}"],
    }


def healthy_lines(seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """Return lines with the number and the times of the healthy runs. seconds: check -> time of each run, with its start."""
    lines = [
        f"healthy, {check}: {len(found)} of {HEALTHY_RUNS} runs, no alarm; median {statistics.median(found):.0f} s, "
        f"longest {max(found):.0f} s"
        for check, found in seconds.items()
    ]
    return [*lines, "aims for healthy runs: environment and fabric check together 180 s, quick half 60 s"]


def drill_config(nodes: int, scratch: Path, **checks: Any) -> dict[str, Any]:
    """Return the config of a run whose checks and first stage have this number of nodes, with one rank each."""
    checks = {"nodes": nodes, "gpus_per_node": 1, "minutes": 5, "min_disk_free_gb": 0.1, **checks}
    config = tiny_config(checks=checks, storage={"scratch": str(scratch)}, scale_test="off")
    config["stages"][0] |= {"nodes": nodes, "gpus_per_node": 1, "global_batch_size": 2 * nodes}
    return config


def job_of_check(plan: Plan, check: str) -> tuple[JobId, Path]:
    """Return the job that runs a check, and its report. The training runs the quick half, whose last part are the pairs."""
    if check == QUICK_HALF:
        name = plan.stages[0].name
        return JobId(STAGE_KIND, (name,)), plan.paths.stage(name).pair_check_report
    return JobId(check), {FABRIC: plan.paths.fabric, ENVIRONMENT: plan.paths.environment}[check]


@dataclass(frozen=True)
class DrillResult:
    """seconds: until the fault was found, or until the check succeeded; passed_on: nodes on which it succeeded."""

    seconds: float
    quarantined: tuple[str, ...]
    problems: list[str]
    passed_on: list[str]


class CheckDrill(PipelineRunOnCluster):
    """A run of which only one check is started, by hand, on this number of nodes of the cluster."""

    def __init__(self, folder: Path, cluster: VirtualCluster, nodes: int, check: str, **checks: Any) -> None:
        config = drill_config(nodes, scratch_folder(cluster), **checks)
        super().__init__(folder, config, cluster, **drill_site(cluster, nodes))
        plan = build_plan(load_config(folder / "run.yaml"))
        write_launch_files(plan, folder)
        job, out = job_of_check(plan, check)
        self._check, self._job = check, JobFolder(folder / plan.paths.job(job).path)
        self._report, self.out = _REPORTS[check], folder / out

    def run_check(self) -> DrillResult:
        """Submit the check and wait until it has found the fault and ended, or run on other nodes."""
        started = time.monotonic()
        job_id = self.cluster.run("sbatch", "--parsable", str(self._job.sbatch_script), cwd=self.folder).strip()
        found = (self.out.exists, failed_path(self.out).exists, self._job.failure.exists, self._quarantined)
        self.cluster.wait(300, "the fault is found or the check succeeds", lambda: any(is_so() for is_so in found))
        seconds = time.monotonic() - started
        if self._check == QUICK_HALF:  # the training itself has no data
            self.cluster.run("scancel", job_id)
        problems = self._report.read(failed_path(self.out)).problems if failed_path(self.out).exists() else []
        self.cluster.wait(300, "the job has ended", lambda: not self.cluster.run("squeue", "-h").strip())
        passed_on = _hosts_of(self._report.read(self.out)) if self.out.exists() else []
        return DrillResult(seconds, self._quarantined(), problems, passed_on)

    def _quarantined(self) -> tuple[str, ...]:
        return read_quarantine(self.folder / QUARANTINE).node_names
