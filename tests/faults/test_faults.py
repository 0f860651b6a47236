"""Faults of every part: the same command finishes, to the same bits, with nothing left behind. `make faults` runs all cells."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longhaul.artifacts.quarantine import quarantine
from tests.cluster.test_virtual_cluster import wait_for
from tests.faults import fault_table
from tests.faults.fault_matrix import CELLS, Cell, shorten, slow_rank
from tests.faults.faulted_run import (
    CONVERT,
    NAN_BATCHES,
    STEPS,
    TOKENIZE,
    TRAIN,
    FaultedRun,
    faulted_config,
    faulted_site,
    write_larger_corpus,
)
from tests.support.chain import Chain
from tests.support.running_cluster import running
from tests.support.slurm_conf import Shape
from tests.support.virtual_cluster import VirtualCluster

SMALL_MB = 24
POLICIES, CONTROLLER = ("skip", "roll_back"), "time limit of the controller job"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Holds a small file system, mounted before the hosts are made, so that all of them see it."""
    folder = tmp_path_factory.mktemp("faults")
    small = folder / "disk-full-training" / "small"
    small.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_MB}m", "tmpfs", str(small)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(small)], check=True)


@pytest.fixture(scope="module")
def three_nodes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    """Two nodes to train on and one to spare."""
    with running(tmp_path_factory.mktemp("three"), Shape(nodes=3)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(three_nodes: VirtualCluster, finished: Chain, folder: Path) -> Callable[[str, int], FaultedRun]:
    """phase, nodes -> the run that nothing happens to, made when it is first asked for."""
    made: dict[tuple[str, int], FaultedRun] = {}

    def run_of(phase: str, nodes: int) -> FaultedRun:
        if (phase, nodes) not in made:
            given = run_of(TRAIN, nodes).results if phase == CONVERT else finished.results
            name = f"undisturbed-{Path(phase).name}-{nodes}"
            run = FaultedRun(folder / name, faulted_config(finished.config, nodes), three_nodes, given, phase)
            prepare(run)
            made[phase, nodes] = timed(run)
        return made[phase, nodes]

    return run_of


def prepare(run: FaultedRun) -> None:
    """Data that take some seconds to tokenize, where that is what will be disturbed."""
    if run.phase == TOKENIZE:
        run.config["datasets"]["prose"]["chunk_mb"] = 4
        run.save()
        write_larger_corpus(run)


def timed(run: FaultedRun) -> FaultedRun:
    started = time.monotonic()
    run.start()
    assert run.finish() == 0, run.said()[-6000:]
    run.seconds = time.monotonic() - started  # pyright: ignore[reportAttributeAccessIssue]
    return run


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> Iterator[list[fault_table.Row]]:
    """A row for every cell that passed; `make faults` keeps them beside the older ones of cells that were not run."""
    rows: list[fault_table.Row] = []
    yield rows
    if rows and pytestconfig.getoption("--all-faults"):
        others = [*(nan_fault(policy) for policy in POLICIES), CONTROLLER]
        fault_table.keep(
            rows, [*((cell.name, cell.when) for cell in CELLS), *((fault, "training") for fault in others)]
        )


@pytest.fixture
def cluster_mended(three_nodes: VirtualCluster) -> Iterator[VirtualCluster]:
    """All nodes are on, plugged in and idle again after the test."""
    yield three_nodes
    for job in three_nodes.run("squeue", "-h", "-o", "%i").split():
        three_nodes.run("scancel", job)
    for node in three_nodes.node_names:
        if three_nodes.is_on(node):
            three_nodes.plug(node)
        else:
            three_nodes.boot(node)
    wait_for(three_nodes.all_idle, 60)


def act_in_time(run: FaultedRun, cell: Cell) -> None:
    if cell.when == "queued":
        run.until(lambda: bool(run.queued_jobs()))
    elif cell.when == "starting":
        run.until(lambda: len(run.ranks()) == 2)
    elif cell.when == "tokenizing":
        run.until(run.has_tokenized_a_unit)
    elif cell.when == "converting":
        run.until(run.is_exporting)
    else:
        run.until(lambda: run.step() > 80)
    if cell.when == "saving":
        run.until(run.is_saving)
    cell.act(run)


def test_a_fault_costs_no_bit(
    cell: Cell,
    cluster_mended: VirtualCluster,
    undisturbed: Callable[[str, int], FaultedRun],
    finished: Chain,
    folder: Path,
    table: list[fault_table.Row],
):
    calm = undisturbed(cell.phase, cell.nodes)
    given = undisturbed(TRAIN, cell.nodes).results if cell.phase == CONVERT else finished.results
    config, site = faulted_config(finished.config, cell.nodes), faulted_site(cell.partition)
    run = FaultedRun(folder / slug(cell), config, cluster_mended, given, cell.phase, site)
    prepare(run)
    if cell.fails_with:
        run.config["storage"] = {"weights": str(run.folder / "small")}
        run.config["checks"]["min_disk_free_gb"] = 0.0
        run.save()
    cell.before(run)
    started = time.monotonic()
    run.start()
    act_in_time(run, cell)
    code = run.finish()
    if cell.fails_with:
        failure = run.read("stages/base/failure.json")
        assert code != 0 and failure["failure_class"] == "permanent", run.said()[-6000:]
        assert cell.fails_with in failure["cause"] and failure["remedy"]
    if cell.told_last:
        assert code == 1 and not run.tried_again() and cell.told_last in run.last_words(), run.said()[-6000:]
    if cell.ended_from_outside or cell.fails_with:
        cell.before_again(run)
        run.start()
        code = run.finish()
    assert code == 0, run.said()[-8000:]
    lost_s = time.monotonic() - started - calm.seconds  # pyright: ignore[reportAttributeAccessIssue]
    assert run.product() == calm.product()
    assert cell.says in run.said()
    nothing_is_left(run, cell.cuts_off)
    assert run.attempts() >= cell.attempts, "the work was done before the fault"
    if cell.phase == TRAIN:
        assert run.trained_steps() == list(range(1, STEPS + 1)), "a step is missing, or was written twice"
        table.append(
            fault_table.row(cell.name, cell.when, lost_s, run.attempts(), run.last_start_up_s(), run.goodput())
        )
    else:
        table.append(fault_table.row(cell.name, cell.when, lost_s, run.attempts()))


def nothing_is_left(run: FaultedRun, cut_off: bool = False) -> None:
    """No job and no process; who was cut off from the others ends, and writes nothing, when it is back."""
    wait_for(lambda: not run.slurm("squeue", "-h", "-o", "%i", "--me").strip(), 30)
    if cut_off:
        for node in run.cluster.node_names:
            run.cluster.plug(node)
        # Slurm ends what is left there when it hears of the node again, for which it takes its time.
        wait_for(lambda: not re.search(r"down|[*]", run.slurm("sinfo", "-h", "-N", "-o", "%T")), 90)
        wait_for(lambda: not run.processes("longhaul"), 60)
        assert run.state()["state"] == "done", "who was cut off wrote over what came after"
    assert [process.cmdline() for process in run.processes("longhaul")] == []


@pytest.mark.all_faults
@pytest.mark.parametrize("policy", POLICIES)
def test_nan_costs_the_named_batches_alone(
    policy: str, cluster_mended: VirtualCluster, finished: Chain, folder: Path, table: list[fault_table.Row]
):
    """Bit-identical to a run without NaN that is given the same list of batches to leave out."""
    window = {"window_batches": 2} if policy == "roll_back" else {}
    stage = {"bad_steps": {"policy": policy, "limit": 3, **window}}
    config = faulted_config(finished.config, **stage)
    site = faulted_site(poisoned=True)
    met = timed(FaultedRun(folder / f"nan-{policy}", config, cluster_mended, finished.results, TRAIN, site))
    left_out = json.loads((met.weights("base") / "skipped.json").read_text())
    assert set(NAN_BATCHES) <= set(left_out)
    told = faulted_config(finished.config, **stage, skip_batches=left_out)
    calm = timed(FaultedRun(folder / f"calm-{policy}", told, cluster_mended, finished.results))
    assert met.masters() == calm.masters()
    nothing_is_left(met)
    lost_s = met.seconds - calm.seconds  # pyright: ignore[reportAttributeAccessIssue]
    row = fault_table.row(nan_fault(policy), "training", lost_s, met.attempts(), met.last_start_up_s(), met.goodput())
    table.append(row)


@pytest.mark.all_faults
def test_the_main_snakemake_outlives_its_own_job(
    cluster_mended: VirtualCluster,
    undisturbed: Callable[[str, int], FaultedRun],
    finished: Chain,
    folder: Path,
    table: list[fault_table.Row],
):
    """controller.sbatch meets its time limit while the stage trains: its successor goes on, and queues none when all is done."""
    calm, config = undisturbed(TRAIN, 2), faulted_config(finished.config)
    run = FaultedRun(folder / "controller", config, cluster_mended, finished.results)
    started = time.monotonic()
    run.start_controller()
    run.until(lambda: run.step() > 10)
    (controller,) = run.slurm("squeue", "-h", "-t", "RUNNING", "-n", "longhaul-tiny-controller", "-o", "%i").split()
    shorten(run, controller)
    # Slurm looks for jobs beyond their limit every half minute: the stage must outlast it.
    while controller in run.slurm("squeue", "-h", "-t", "RUNNING", "-o", "%i").split():
        slow_rank(1, 2, stopped_s=0.06)(run)
    wait_for(lambda: (run.folder / run.target).exists() and not run.slurm("squeue", "-h", "-o", "%i").strip(), 240)
    assert run.masters() == calm.masters()
    assert run.trained_steps() == list(range(1, STEPS + 1))
    assert "has ended; taking over" in (run.results / "logs/controller.log").read_text()
    nothing_is_left(run)
    lost_s = time.monotonic() - started - calm.seconds  # pyright: ignore[reportAttributeAccessIssue]
    row = fault_table.row(CONTROLLER, "training", lost_s, run.attempts(), run.last_start_up_s())
    table.append(row)


def test_a_quarantine_that_leaves_too_few_nodes_is_refused(
    cluster_mended: VirtualCluster, finished: Chain, folder: Path
):
    run = FaultedRun(folder / "quarantined", faulted_config(finished.config), cluster_mended, finished.results)
    quarantine(run.folder / "results/quarantine.json", ["n1", "n3"], "no answer", "job 7")
    run.start()
    assert run.finish() == 2
    said = run.said()
    assert "partition main has 3, of which n1, n3 are quarantined" in said and "Traceback" not in said
    assert run.slurm("squeue", "-h", "-o", "%i").strip() == ""


def nan_fault(policy: str) -> str:
    return f"NaN in {len(NAN_BATCHES)} batches, {policy}"


def slug(cell: Cell) -> str:
    return f"{cell.name} {cell.when}".replace(" ", "-").replace(",", "")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        chosen = [cell for cell in CELLS if cell.quick or metafunc.config.getoption("--all-faults")]
        metafunc.parametrize("cell", chosen, ids=[slug(cell) for cell in chosen])
