"""Faults of every part: the same command finishes, to the same bits, with nothing left behind. `make faults` runs all cells."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chain import REPOSITORY, Chain
from faults import CELLS, SAVE_EVERY, STEPS, Cell, FaultedRun
from running import running
from test_virtual_cluster import wait_for
from virtual_cluster import Shape, VirtualCluster

sys.path.insert(0, str(REPOSITORY / "bench"))
from machine import header, publish

SMALL_MB = 24


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
def undisturbed(three_nodes: VirtualCluster, finished: Chain, folder: Path) -> FaultedRun:
    """The run that nothing happens to."""
    run = FaultedRun(folder / "undisturbed", finished.config, three_nodes, finished.results)
    started = time.monotonic()
    run.start()
    assert run.finish() == 0, run.said()[-6000:]
    run.seconds = time.monotonic() - started  # pyright: ignore[reportAttributeAccessIssue]
    return run


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """A line for every cell that passed; the whole matrix is kept."""
    lines = [f"{'fault':<45} {'while':<9} {'lost s':>7} {'legs':>5} {'resumed from':>12}"]
    yield lines
    if sum("cell" in getattr(item, "fixturenames", ()) for item in request.session.items) == len(CELLS):
        head = ["command: make faults", *header(("torch", "deepspeed", "snakemake"))[1:]]
        said = f"{len(lines) - 1} of {len(CELLS)} cells: final weights bit-identical to the undisturbed run's, every step once"
        publish("faults", [*head, said, "", *lines])


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
    if cell.when == "starting":
        run.until(lambda: len(run.ranks()) == 2)
    else:
        run.until(lambda: run.step() > 3 * SAVE_EVERY)
    if cell.when == "saving":
        run.until(run.is_saving)
    cell.act(run)


def test_a_fault_costs_no_bit(
    cell: Cell,
    cluster_mended: VirtualCluster,
    undisturbed: FaultedRun,
    finished: Chain,
    folder: Path,
    table: list[str],
):
    run = FaultedRun(folder / slug(cell), finished.config, cluster_mended, finished.results)
    if cell.fails_with:
        run.config["storage"] = {"weights": str(run.folder / "small")}
        run.config["checks"]["min_disk_free_gb"] = 0.0
        run.save()
    started = time.monotonic()
    run.start()
    act_in_time(run, cell)
    code = run.finish()
    if cell.fails_with:
        failure = run.read("stages/base/failure.json")
        assert code != 0 and failure["failure_class"] == "permanent", run.said()[-6000:]
        assert cell.fails_with in failure["cause"] and failure["remedy"]
        assert cell.mends is not None
        cell.mends(run)
    if cell.ended_from_outside or cell.fails_with:
        run.start()
        code = run.finish()
    assert code == 0, run.said()[-8000:]
    lost_s = time.monotonic() - started - undisturbed.seconds  # pyright: ignore[reportAttributeAccessIssue]
    assert run.trained_steps() == list(range(1, STEPS + 1)), "a step is missing, or was written twice"
    assert run.masters() == undisturbed.masters()
    wait_for(lambda: not cluster_mended.run("squeue", "-h", "-n", "", "-o", "%i", "--me").strip(), 30)
    if cell.cuts_off:
        for node in cluster_mended.node_names:
            cluster_mended.plug(node)
        wait_for(lambda: not run.processes("longhaul"), 60)
        assert run.state()["state"] == "done", "who was cut off wrote over what came after"
    assert [process.cmdline() for process in run.processes("longhaul")] == []
    legs = run.legs()
    assert len(legs) >= cell.starts, "the run had ended before the fault"
    table.append(f"{cell.name:<45} {cell.when:<9} {lost_s:7.1f} {len(legs):5} {legs[-1]['resumed_from']:12}")


def slug(cell: Cell) -> str:
    return f"{cell.name} {cell.when}".replace(" ", "-").replace(",", "")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        chosen = [cell for cell in CELLS if cell.quick or metafunc.config.getoption("--all-faults")]
        metafunc.parametrize("cell", chosen, ids=[slug(cell) for cell in chosen])
