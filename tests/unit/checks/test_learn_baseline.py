"""`longhaul baseline` stores the usual rates of a healthy run beside the site file, and the next check's spec holds them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from longhaul.artifacts.artifact_schemas import EnvironmentReport, failed_path
from longhaul.artifacts.fabric_report import FabricReport, PairResult
from longhaul.artifacts.paths import JobId
from longhaul.artifacts.site_baseline import SiteBaseline, baseline_path, read_baseline
from longhaul.checks.learn_baseline import learn_baseline, print_baseline
from longhaul.checks.measurement_types import BurnIn, DiskSpeed, GpuPair, NodeMeasurements, SafeWrite
from longhaul.cli import main
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.environment_job import EnvironmentSpec
from longhaul.jobs.kinds.fabric_job import FabricSpec
from longhaul.planning import Plan
from tests.support.small_configs import plan_of


def write_report(path: Path, *rates: float, gpu: str = "NVIDIA H200") -> None:
    """Write environment.json of nodes with two GPUs of the given rate each."""
    nodes = []
    for number, rate in enumerate(rates):
        burn_in = BurnIn(9, 0, rate, 3900.0, 55.0, 54.0)
        pairs = [GpuPair(0, 1, rate / 2, 0, "NVLink")]
        measured = NodeMeasurements([burn_in] * 2, 400.0, DiskSpeed(3.0, 6.0), SafeWrite(0.2), gpu_pairs=pairs)
        nodes.append({"host": f"n{number}", "gpus": [{"name": gpu}] * 2, "cpus": 2, "memory_bytes": 1, "disk_free_bytes": 1,
                      "clock_skew_s": 0.0, "versions": {}, "measured": asdict(measured)})  # fmt: skip
    EnvironmentReport([], nodes, []).write(path)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    return plan_of(tmp_path)


def test_usual_rates_are_median_and_spread_over_all_gpus(plan: Plan):
    write_report(plan.paths.environment, 700.0, 720.0, 650.0)
    learned = learn_baseline(plan)
    assert (learned.gpu, learned.run) == ("NVIDIA H200", plan.run)
    assert learned.rates["matrix_tflops"] == {"median": 700.0, "lowest": 650.0, "highest": 720.0, "count": 6}
    assert learned.rates["disk_read_gb_per_s"]["count"] == 3
    assert learned.gpu_pairs == {"NVLink": {"median": 350.0, "lowest": 325.0, "highest": 360.0, "count": 3}}


def test_network_is_not_stored_if_something_slow_was_accepted(plan: Plan, capsys: pytest.CaptureFixture[str]):
    write_report(plan.paths.environment, 700.0, 720.0)
    pairs = [PairResult(hosts=["n1", "n2"], rail=0, bandwidth_gbps=4.0, latency_us=9.0)]
    report = FabricReport([], "nccl", 2, ["n1", "n2"], [], {}, pairs, accepted=["n2 is slow"])
    report.write(plan.paths.fabric)
    assert learn_baseline(plan).network == {}
    assert (
        "no rates of the network are stored, as something was slow: n2 is slow\n  remedy: after"
        in capsys.readouterr().out
    )
    plan.paths.fabric.unlink()
    replace(report, accepted=[]).write(plan.paths.fabric)
    healthy = learn_baseline(plan)
    healthy.write(baseline_path(plan.loaded.site_path))
    report.write(plan.paths.fabric)
    assert learn_baseline(plan).network == healthy.network != {}
    assert "the earlier rates of the network stay" in capsys.readouterr().out


def test_network_is_stored_if_the_fabric_check_passed_too(plan: Plan, capsys: pytest.CaptureFixture[str]):
    write_report(plan.paths.environment, 700.0, 720.0)
    assert learn_baseline(plan).network == {}
    pairs = [
        PairResult(hosts=["n1", f"n{n}"], rail=0, bandwidth_gbps=rate, latency_us=9.0)
        for n, rate in ((2, 48.0), (3, 46.0))
    ]
    FabricReport([], "nccl", 6, ["n1", "n2", "n3"], [], {}, pairs).write(plan.paths.fabric)
    learned = learn_baseline(plan)
    name = "pairs of nodes, nccl, 2 ranks per node"
    assert learned.network == {name: {"median": 47.0, "lowest": 46.0, "highest": 48.0, "count": 2}}
    print_baseline(learned)
    assert "pairs of nodes" in capsys.readouterr().out
    learned.write(baseline_path(plan.loaded.site_path))
    spec = job_spec(plan, JobId("fabric"))
    assert isinstance(spec, FabricSpec) and spec.baseline == learned
    assert FabricSpec.model_validate_json(spec.to_json()) == spec
    before = spec.rerun_key()
    baseline_path(plan.loaded.site_path).unlink()
    assert job_spec(plan, JobId("fabric")).rerun_key() == before, "a baseline runs no finished check again"


def test_file_is_beside_the_site_file_and_the_next_check_reads_it(plan: Plan, capsys: pytest.CaptureFixture[str]):
    write_report(plan.paths.environment, 700.0)
    with pytest.raises(SystemExit) as ended:
        main(["baseline", str(plan.loaded.path)])
    assert ended.value.code == 0
    path = baseline_path(plan.loaded.site_path)
    assert path.name == "site.baseline.json" and path.parent == plan.loaded.site_path.parent
    printed = capsys.readouterr().out
    assert "matrix products under load" in printed and "copies between GPUs, NVLink" in printed
    assert f"wrote {path}" in printed.replace("\n", "")
    spec = job_spec(plan, JobId("environment"))
    assert isinstance(spec, EnvironmentSpec) and spec.baseline == SiteBaseline.read(path)
    assert EnvironmentSpec.model_validate_json(spec.to_json()) == spec
    before = spec.rerun_key()
    path.unlink()
    assert job_spec(plan, JobId("environment")).rerun_key() == before, "a baseline runs no finished check again"


def test_run_without_a_passed_check_is_refused_until_it_has_passed(plan: Plan):
    with pytest.raises(UserError, match="the environment check has not run"):
        learn_baseline(plan)
    write_report(failed_path(plan.paths.environment), 700.0)
    with pytest.raises(
        UserError, match=r"the environment check failed, so its rates are not those of healthy nodes"
    ) as refused:
        learn_baseline(plan)
    assert refused.value.hint == f"run the check: longhaul run {plan.loaded.path} {plan.paths.environment}"
    write_report(plan.paths.environment, 700.0)
    assert learn_baseline(plan)


def test_report_without_measurements_is_refused_until_it_is_written_again(plan: Plan):
    node = {
        "host": "n1",
        "gpus": [],
        "cpus": 2,
        "memory_bytes": 1,
        "disk_free_bytes": 1,
        "clock_skew_s": 0.0,
        "versions": {},
    }
    EnvironmentReport([], [node], []).write(plan.paths.environment)
    with pytest.raises(UserError, match="node n1 has no measurements"):
        learn_baseline(plan)
    plan.paths.environment.unlink()
    write_report(plan.paths.environment, 700.0)
    assert learn_baseline(plan).rates["matrix_tflops"]["median"] == 700.0


def test_damaged_baseline_is_an_error_of_the_plan(plan: Plan):
    assert read_baseline(plan.loaded.site_path) is None
    baseline_path(plan.loaded.site_path).write_text("{}")
    with pytest.raises(UserError, match="measure again: longhaul baseline") as raised:
        job_spec(plan, JobId("environment"))
    assert "site.baseline.json" in raised.value.message
