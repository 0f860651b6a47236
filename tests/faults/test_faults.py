"""Faults of every part: the same command finishes with bit-identical results and leaves nothing behind.

`make faults` runs all cases, `make test` the quick ones.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.quarantine import add_to_quarantine
from tests.faults import faults_record
from tests.faults.broken_environments import SMALL
from tests.faults.doctor_answers import Doctor
from tests.faults.fault_matrix import (
    CASES,
    CONTROLLER,
    OTHER_FAULTS,
    POLICIES,
    THE_START,
    FaultCase,
    nan_fault,
    shorten_allocation,
    slow_rank,
)
from tests.faults.faulted_run import (
    EXPORT,
    NAN_BATCHES,
    QUICK_STEPS,
    STEPS,
    TOKENIZE,
    TRAIN,
    FaultedRun,
    faulted_config,
    faulted_site,
    write_larger_corpus,
)
from tests.support.pipeline_run import PipelineRun
from tests.support.running_cluster import running_cluster
from tests.support.slurm_conf import ClusterSize
from tests.support.virtual_cluster import VirtualCluster
from tests.support.wait import wait_for

SMALL_MB = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with small file systems, which are mounted before the hosts start, so that all of them see them."""
    folder = tmp_path_factory.mktemp("faults")
    mounts = [folder / slug(case) / case.mount for case in CASES if case.mount]
    for mount in mounts:
        mount.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_MB}m", "tmpfs", str(mount)], check=True)
    yield folder
    for mount in mounts:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.fixture(scope="module")
def three_nodes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    """Two nodes for the training and one spare node."""
    with running_cluster(tmp_path_factory.mktemp("three"), ClusterSize(nodes=3)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def steps(pytestconfig: pytest.Config) -> int:
    """The length of the runs. Some faults last for seconds, in which the training must not end; the quick ones do not."""
    return STEPS if pytestconfig.getoption("--all-faults") else QUICK_STEPS


@pytest.fixture(scope="module")
def undisturbed(
    three_nodes: VirtualCluster, finished: PipelineRun, folder: Path, steps: int
) -> Callable[[str, int], FaultedRun]:
    """A function of (phase, nodes) that returns the run without a fault; it runs at the first call."""
    runs: dict[tuple[str, int], FaultedRun] = {}

    def run_of(phase: str, nodes: int) -> FaultedRun:
        if (phase, nodes) not in runs:
            given = run_of(TRAIN, nodes).results if phase == EXPORT else finished.results
            name = f"undisturbed-{Path(phase).name}-{nodes}"
            run = FaultedRun(folder / name, faulted_config(finished.config, nodes, steps), three_nodes, given, phase)
            prepare(run)
            runs[phase, nodes] = finish_timed(run)
        return runs[phase, nodes]

    return run_of


def prepare(run: FaultedRun, case: FaultCase | None = None) -> None:
    """Write data that take some seconds to tokenize, if the fault comes while tokenizing. Use the case's disk and checks."""
    if case and case.mount == SMALL:
        run.config["storage"] = {"weights": str(run.folder / SMALL)}
        run.config["checks"]["min_disk_free_gb"] = 0.0
    if case:
        run.config["checks"] |= case.checks
        run.save()
    if run.phase == TOKENIZE:
        run.config["datasets"]["prose"]["chunk_mb"] = 4
        run.save()
        write_larger_corpus(run)


def finish_timed(run: FaultedRun) -> FaultedRun:
    """Run to the end and record the time in seconds."""
    started = time.monotonic()
    run.start()
    assert run.finish() == 0, run.output()[-6000:]
    run.seconds = time.monotonic() - started
    return run


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> Iterator[list[faults_record.TableRow]]:
    """Rows of the cases that passed. `make faults` writes them; older rows of cases that did not run stay."""
    rows: list[faults_record.TableRow] = []
    yield rows
    if rows and pytestconfig.getoption("--all-faults"):
        faults_record.write_table(
            rows, [*((case.name, case.when) for case in CASES), *((fault, "training") for fault in OTHER_FAULTS)]
        )


@pytest.fixture
def repaired_cluster(three_nodes: VirtualCluster) -> Iterator[VirtualCluster]:
    """A cluster whose nodes are powered on, plugged in and idle again after the test."""
    yield three_nodes
    for job in three_nodes.run("squeue", "-h", "-o", "%i").split():
        three_nodes.run("scancel", job)
    three_nodes.write_host_names()
    for node in three_nodes.node_names:
        if three_nodes.is_on(node):
            three_nodes.plug(node)
        else:
            three_nodes.boot(node)
    wait_for(three_nodes.all_idle, 60)


def inject_at_the_right_time(run: FaultedRun, case: FaultCase) -> None:
    if case.when == THE_START:
        return
    if case.when == "queued":
        run.wait_until(lambda: bool(run.queued_jobs()))
    elif case.when == "starting":
        run.wait_until(lambda: len(run.ranks()) == 2)
    elif case.when == "tokenizing":
        run.wait_until(run.has_encoded_a_chunk)
    elif case.when == "exporting":
        run.wait_until(run.is_exporting)
    else:
        run.wait_until(lambda: run.step() > 80)
    if case.when == "saving":
        run.wait_until(run.is_saving)
    case.inject(run)


def test_results_are_bit_identical_after_a_fault(
    case: FaultCase,
    repaired_cluster: VirtualCluster,
    undisturbed: Callable[[str, int], FaultedRun],
    finished: PipelineRun,
    folder: Path,
    steps: int,
    table: list[faults_record.TableRow],
):
    expected = undisturbed(case.phase, case.nodes)
    given = undisturbed(TRAIN, case.nodes).results if case.phase == EXPORT else finished.results
    config, site = faulted_config(finished.config, case.nodes, steps), faulted_site(case.partition)
    run = FaultedRun(folder / slug(case), config, repaired_cluster, given, case.phase, site)
    prepare(run, case)
    case.before_start(run)
    doctor = Doctor(run)
    started = time.monotonic()
    run.start()
    inject_at_the_right_time(run, case)
    code = run.finish()
    doctor.ask()
    if case.fails_with and not case.ends_command:
        assert_waits_for_a_repair(run, case, code)
    if case.last_message:
        assert code == 1 and not run.was_retried() and case.last_message in run.failure_message(), run.output()[-6000:]
    if case.ends_command or case.fails_with:
        case.before_second(run)
        run.start()
        code = run.finish()
    if case.remedy:
        assert_waits_for_a_repair(run, case, code)
        doctor.ask()
        case.remedy(run)
        run.start()
        code = run.finish()
    assert code == 0, run.output()[-8000:]
    lost_s = time.monotonic() - started - doctor.seconds - expected.seconds
    doctor.ask()
    doctor.assert_named_the_cause(case.name, case.fails_with)
    assert run.product() == expected.product()
    assert case.logs in run.output()
    assert_nothing_is_left(run, case.cuts_off_node)
    assert run.attempts() >= case.min_attempts, "the work was done before the fault"
    if case.phase == TRAIN:
        assert run.trained_steps() == list(range(1, steps + 1)), "a step is missing, or was written twice"
        table.append(
            faults_record.passed_row(case.name, case.when, lost_s, run.attempts(), run.last_start_up_s(), run.goodput())
        )
    else:
        table.append(faults_record.passed_row(case.name, case.when, lost_s, run.attempts()))


def assert_waits_for_a_repair(run: FaultedRun, case: FaultCase, code: int) -> None:
    """Assert that the command failed once, with the expected cause and a remedy."""
    assert code == 1 and not run.was_retried(), run.output()[-6000:]
    failure = run.failure(case.phase)
    assert failure["failure_class"] == "environment" and failure["remedy"]
    assert case.fails_with in failure["cause"] and failure["cause"] in run.output()


def assert_nothing_is_left(run: FaultedRun, cut_off: bool = False) -> None:
    """Assert that no job and no process is left. Processes on a node that was cut off must end and write nothing."""
    wait_for(lambda: not run.slurm("squeue", "-h", "-o", "%i", "--me").strip(), 30)
    if cut_off:
        for node in run.cluster.node_names:
            run.cluster.plug(node)
        # Slurm ends the processes there when the node responds again, which takes some time.
        wait_for(lambda: not re.search(r"down|[*]", run.slurm("sinfo", "-h", "-N", "-o", "%T")), 90)
        # srun waits 60 s for its other tasks before it ends the step, and with it the supervisor on that node.
        wait_for(lambda: not run.processes("longhaul"), 120)
        assert run.state()["state"] == "done", "a node that was cut off overwrote later results"
    assert [process.cmdline() for process in run.processes("longhaul")] == []


@pytest.mark.all_faults
@pytest.mark.parametrize("policy", POLICIES)
def test_nan_skips_only_the_listed_batches(
    policy: str,
    repaired_cluster: VirtualCluster,
    finished: PipelineRun,
    folder: Path,
    table: list[faults_record.TableRow],
):
    """The run is bit-identical to a run without NaN whose config skips the same batches."""
    window = {"window_batches": 2} if policy == "roll_back" else {}
    stage = {"bad_steps": {"policy": policy, "limit": 3, **window}}
    config = faulted_config(finished.config, **stage)
    site = faulted_site(NAN_BATCHES=",".join(map(str, NAN_BATCHES)))
    with_nan = finish_timed(
        FaultedRun(folder / f"nan-{policy}", config, repaired_cluster, finished.results, TRAIN, site)
    )
    skipped = json.loads((with_nan.weights("base") / "skipped.json").read_text())
    assert set(NAN_BATCHES) <= set(skipped)
    doctor = Doctor(with_nan)
    doctor.ask()
    doctor.assert_named_the_cause(nan_fault(policy))
    skipping = faulted_config(finished.config, **stage, skip_batches=skipped)
    expected = finish_timed(FaultedRun(folder / f"expected-{policy}", skipping, repaired_cluster, finished.results))
    assert with_nan.master_weights() == expected.master_weights()
    assert_nothing_is_left(with_nan)
    lost_s = with_nan.seconds - expected.seconds
    row = faults_record.passed_row(
        nan_fault(policy), "training", lost_s, with_nan.attempts(), with_nan.last_start_up_s(), with_nan.goodput()
    )
    table.append(row)


@pytest.mark.all_faults
def test_controller_job_continues_after_its_time_limit(
    repaired_cluster: VirtualCluster,
    undisturbed: Callable[[str, int], FaultedRun],
    finished: PipelineRun,
    folder: Path,
    table: list[faults_record.TableRow],
):
    """controller.sbatch reaches its time limit while the stage trains. Its successor continues, and submits none at the end."""
    expected, config = undisturbed(TRAIN, 2), faulted_config(finished.config)
    run = FaultedRun(folder / "controller", config, repaired_cluster, finished.results)
    started = time.monotonic()
    run.start_controller()
    run.wait_until(lambda: run.step() > 10)
    (controller,) = run.slurm("squeue", "-h", "-t", "RUNNING", "-n", "longhaul-tiny-controller", "-o", "%i").split()
    shorten_allocation(run, controller)
    # Slurm looks for jobs beyond their limit every 30 s. The stage must last longer.
    while controller in run.slurm("squeue", "-h", "-t", "RUNNING", "-o", "%i").split():
        slow_rank(1, 2, stopped_s=0.06)(run)
    wait_for(lambda: (run.folder / run.target).exists() and not run.slurm("squeue", "-h", "-o", "%i").strip(), 240)
    assert run.master_weights() == expected.master_weights()
    assert run.trained_steps() == list(range(1, STEPS + 1))
    log = (run.results / "logs/controller.log").read_text()
    assert "works on this run already" not in log and "stage base continues at step" in log
    assert_nothing_is_left(run)
    lost_s = time.monotonic() - started - expected.seconds
    doctor = Doctor(run)
    doctor.ask()
    doctor.assert_named_the_cause(CONTROLLER)
    row = faults_record.passed_row(CONTROLLER, "training", lost_s, run.attempts(), run.last_start_up_s())
    table.append(row)


@pytest.mark.all_faults
def test_ranks_of_one_machine_do_not_need_its_name(finished: PipelineRun, tmp_path: Path):
    """torchrun gives the ranks the machine's own name as rank 0's address, unless it gets another one."""
    chain = PipelineRun(tmp_path / "nameless", finished.config)
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname nameless.invalid && exec "$@"', "sh"]
    command = [*renamed, *chain.command("results/tiny/stages/base/checkpoint.json")]
    done = subprocess.run(
        command, cwd=chain.folder, env=chain.environment(), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:] + chain.logs()
    assert reference_tensors(chain) == reference_tensors(finished)


def reference_tensors(chain: PipelineRun) -> Any:
    (found,) = chain.weights("base").glob("checkpoints/step-00000040/reference/tensors.json")
    return json.loads(found.read_text())


def test_quarantine_that_leaves_too_few_nodes_is_refused(
    repaired_cluster: VirtualCluster, finished: PipelineRun, folder: Path
):
    run = FaultedRun(folder / "quarantined", faulted_config(finished.config), repaired_cluster, finished.results)
    add_to_quarantine(run.folder / "results/quarantine.json", dict.fromkeys(["n1", "n3"], "no answer"), "job 7")
    run.start()
    assert run.finish() == 2
    output = run.output()
    reason = "(no answer; found by job 7)"
    assert f"partition main has 3, of which 2 are quarantined: n1 {reason}, n3 {reason}" in output
    assert "Traceback" not in output
    assert run.slurm("squeue", "-h", "-o", "%i").strip() == ""


def slug(case: FaultCase) -> str:
    return f"{case.name} {case.when}".replace(" ", "-").replace(",", "")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        selected = [case for case in CASES if case.quick or metafunc.config.getoption("--all-faults")]
        metafunc.parametrize("case", selected, ids=[slug(case) for case in selected])
