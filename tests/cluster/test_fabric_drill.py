"""The two checks on a cluster of which a host or a link has a fault: they name it, and it costs the run that host alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bench.machine import describe_machine, write_result
from longhaul.artifacts.fabric_report import FabricReport
from longhaul.artifacts.line_record_fields import Attempt
from longhaul.artifacts.line_records import read_records
from longhaul.artifacts.node_results import read_node_results
from longhaul.artifacts.paths import QUARANTINE, RESULTS, WeightsFolder
from longhaul.artifacts.quarantine import read_quarantine
from tests.cluster.fabric_drill import (
    CASES,
    FABRIC,
    HEALTHY,
    HEALTHY_RUNS,
    RATE,
    SLOW,
    CheckDrill,
    DrillCase,
    DrillResult,
    healthy_lines,
    limit_link,
    limited,
)
from tests.faults.faulted_run import FaultedRun, faulted_config
from tests.support.pipeline_run import PipelineRun
from tests.support.running_cluster import running_cluster
from tests.support.slurm_conf import ClusterSize
from tests.support.virtual_cluster import VirtualCluster

QUICK_HOSTS, ALL_HOSTS = 4, 8


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        is_all = metafunc.config.getoption("--all-drills")
        cases = [*CASES, *HEALTHY * HEALTHY_RUNS] if is_all else [case for case in CASES if case.quick]
        metafunc.parametrize("case", cases, ids=[case.name.replace(" ", "-").replace("/", "") for case in cases])


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[VirtualCluster]:
    count = ALL_HOSTS if pytestconfig.getoption("--all-drills") else QUICK_HOSTS
    with running_cluster(tmp_path_factory.mktemp("drill"), ClusterSize(nodes=count, cpus=1, memory_mb=2000)) as found:
        for name in found.node_names:
            limit_link(found, name, RATE)
        yield found


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> DrillTable:
    return DrillTable(is_written=pytestconfig.getoption("--all-drills"))


@dataclass
class DrillTable:
    """The cases that passed. With --all-drills they are written to bench/results/fabric_drill.txt, after each case."""

    is_written: bool
    found: list[str] = field(default_factory=list)
    healthy_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, case: DrillCase, result: DrillResult) -> None:
        if case in HEALTHY:
            self.healthy_s[case.check].append(result.seconds)
        else:
            after = f"; passed on {', '.join(result.passed_on)}" if result.passed_on else ""
            message = case.message or f"{case.named} does not respond"
            seconds = f"found after {result.seconds:.0f} s of at most {case.within_s:.0f} s"
            self.found.append(f"{case.name}: {case.check} check, {seconds}: {message}{after}")
        if self.is_written:
            write_result("fabric_drill", self._lines())

    def _lines(self) -> list[str]:
        head = ["command: make fabric-drill", *describe_machine(("torch",))[1:]]
        summary = f"{ALL_HOSTS} hosts of a Slurm cluster on one machine, each check runs on {ALL_HOSTS - 1} of them"
        counts = f"{len(self.found)} of {len(CASES)} faults were found"
        return [*head, summary, counts, *self.found, *healthy_lines(self.healthy_s)]


def test_fault_is_found(case: DrillCase, hosts: VirtualCluster, tmp_path: Path, table: DrillTable):
    drill = CheckDrill(tmp_path, hosts, hosts.size.nodes - 1, case.check)
    with case.inject(hosts):
        found = drill.run_check()
    named = (case.named,) if case.named else ()
    assert found.quarantined == named, found
    assert [case.message in problem for problem in found.problems] == ([True] if case.message else []), found
    assert found.seconds < case.within_s
    is_passed = bool(case.named) or not case.message
    assert len(found.passed_on) == (hosts.size.nodes - 1 if is_passed else 0)
    assert case.named not in found.passed_on
    table.add(case, found)


@pytest.mark.slow
def test_slow_node_is_a_warning_where_the_config_accepts_it(hosts: VirtualCluster, tmp_path: Path):
    drill = CheckDrill(tmp_path, hosts, hosts.size.nodes - 1, FABRIC, bad_hardware="warn")
    with limited("n2", SLOW)(hosts):
        found = drill.run_check()
    assert (found.quarantined, found.problems, len(found.passed_on)) == ((), [], hosts.size.nodes - 1)
    report = FabricReport.read(drill.out)
    assert [node["host"] for node in report.slow_nodes] == ["n2"] and report.results
    assert report.accepted[0].startswith("n2 is slow with most other nodes")


@pytest.mark.slow
def test_slow_node_costs_a_training_that_node_alone(finished: PipelineRun, hosts: VirtualCluster, tmp_path: Path):
    """The training finds the slow node before its first step, continues on the spare one, and finishes."""
    config = faulted_config(finished.config, nodes=3, steps=30, global_batch_size=12)
    run = FaultedRun(tmp_path / "run", config, hosts, finished.results)
    with limited("n2", SLOW)(hosts):
        run.start()
        assert run.finish() == 0, run.output()
    assert read_quarantine(run.folder / QUARANTINE).node_names == ("n2",)
    (attempt,) = read_records(WeightsFolder(run.weights("base")).attempts, Attempt)
    assert len(attempt["hosts"]) == 3 and "n2" not in attempt["hosts"]
    problems = {row["node"]: row["problem"].partition(":")[0] for row in read_node_results(run.folder / RESULTS)}
    assert problems.pop("n2") == "slow" and not any(problems.values())
    assert problems.keys() >= set(attempt["hosts"])
