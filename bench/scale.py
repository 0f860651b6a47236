"""Measures what grows with the number of ranks, with simulated ranks on this machine: time, bytes, CPU time, and how they grow.

Ranks are threads that run longhaul's own rendezvous and heartbeats against rank 0's store. Files, tables and messages have the
content that so many ranks or nodes would write. All of them share the cores of this machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.machine import describe_machine, write_result
from bench.scale_records_and_failure_reports import measure_failed_rank, measure_records
from bench.simulated_ranks import (
    HEARTBEAT_TIMEOUT_S,
    MISSING_TIMEOUT_S,
    RANKS_PER_NODE,
    connect,
    meet_without_last,
    run_other_ranks,
    run_rank_0,
)
from longhaul.artifacts.atomic_files import file_blake3, write_json
from longhaul.artifacts.compare_hashes import FileHashes, wrong_files
from longhaul.artifacts.paths import STAGE_KIND, JobId
from longhaul.checks.environment import _judge
from longhaul.checks.pair_evidence import PairEvidence, PairMeasurement
from longhaul.checks.pair_schedule import order_of_rounds, pairs_of_round, planned_rounds
from longhaul.config.run_config import Checks
from longhaul.jobs.launch_files import render_job
from longhaul.runtime.rendezvous import host_key
from longhaul.train.checkpoint.checkpoint_folders import MANIFEST, read_manifest
from longhaul.train.verified_inputs import own_part
from tests.support.checkpoint_manifest import manifest_fields
from tests.support.healthy_node_facts import environment_job, two_gpu_nodes
from tests.support.small_configs import plan_of

MEASURED_RANKS, CALCULATED_RANKS = (64, 512, 4096), 16_384
CLIENT_PROCESSES = 4
CHECKPOINT_BYTES = 64 * 2**20
"""Bytes of all optimizer files, which the ranks divide among them. They are read from the page cache."""
NAMES = "names are looked up in /etc/hosts only"
Measured = dict[str, float]
"""Name of a measurement, with its unit -> value."""
AIMS = (
    "aims at 4,096 ranks: all ranks have met 30 s after the last one came; heartbeats take 5 % of a core of rank 0; a rank that "
    f"stops is named {HEARTBEAT_TIMEOUT_S + 10:.0f} s later, with a time-out of {HEARTBEAT_TIMEOUT_S:.0f} s"
)


def main() -> None:
    """Measure, calculate the largest number of ranks, and write the record."""
    _use_no_name_service()
    load = f"load average before the run: {os.getloadavg()[0]:.1f}"
    found = {ranks: measure(ranks) for ranks in MEASURED_RANKS}
    columns = "".join(f"{ranks:>12,}" for ranks in (*MEASURED_RANKS, CALCULATED_RANKS))
    lines = [f"{'ranks':62}{columns}  exponent"]
    for name in found[MEASURED_RANKS[0]]:
        values = [found[ranks][name] for ranks in MEASURED_RANKS]
        exponent = growth(MEASURED_RANKS, values)
        largest = values[-1] * (CALCULATED_RANKS / MEASURED_RANKS[-1]) ** exponent
        lines.append(f"{name:62}" + "".join(f"{value:12,.3g}" for value in (*values, largest)) + f"{exponent:10.2f}")
    calculated = (
        f"{CALCULATED_RANKS:,} ranks are calculated: value ~ ranks ^ exponent, from the last two columns before it"
    )
    write_result("scale", [*describe_machine(("torch",)), load, NAMES, *lines, calculated, AIMS])


def _use_no_name_service() -> None:
    """Let this process and its children look up names in /etc/hosts only (`__nss_configure_lookup` in glibc's nss.h).

    torch's store looks up the name of each rank's address. Thousands of questions in a second measure the name service alone.
    """
    if ctypes.CDLL(None).__nss_configure_lookup(b"hosts", b"files") != 0:
        raise SystemExit("glibc does not let the bench choose where names are looked up")


def growth(ranks: tuple[int, ...], values: list[float]) -> float:
    """Return the exponent of the growth between the two largest numbers of ranks; 0.0 where nothing is measured."""
    before, last = values[-2:]
    return math.log(last / before) / math.log(ranks[-1] / ranks[-2]) if before > 0 and last > 0 else 0.0


def measure(ranks: int) -> Measured:
    """Return all measurements of this number of ranks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            **_missing_rank(ranks),
            **_connections(ranks),
            **_launch_files(folder / "launch", ranks),
            **_checkpoint(folder / "checkpoint", ranks),
            **_environment_check(folder, ranks),
            **_pair_evidence(ranks // RANKS_PER_NODE),
            **measure_records(folder / "run", ranks),
            **measure_failed_rank(folder / "failed", ranks),
        }


def _missing_rank(ranks: int) -> Measured:
    """Let all ranks but the last one come, until each of them names it."""
    _choose_port()
    parts = [[0], *(range(1 + part, ranks - 1, CLIENT_PROCESSES) for part in range(CLIENT_PROCESSES))]
    with contextlib.ExitStack() as stack:
        pipes = [stack.enter_context(_process(meet_without_last, ranks, part)) for part in parts]
        found = [pipe.recv() for pipe in pipes]
    if (named := sum(count for _, _, count in found)) != ranks - 1:
        raise SystemExit(f"{named} of {ranks - 1} ranks named rank {ranks - 1}, which did not come")
    began_s, ended_s = found[0][0], max(ended for _, ended, _ in found)
    name = "rendezvous: s from the time-out until all name a missing rank"
    return {name: ended_s - began_s - MISSING_TIMEOUT_S}


def _choose_port() -> None:
    """Let rank 0 serve its store at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))


def _connections(ranks: int) -> Measured:
    """Let rank 0 and the others meet, the last one later; then let all send heartbeats, and one stop."""
    _choose_port()
    last, stopped = ranks - 1, ranks // 2
    parts = [range(1 + part, last, CLIENT_PROCESSES) for part in range(CLIENT_PROCESSES)]
    with _process(run_rank_0, ranks) as rank_0, contextlib.ExitStack() as stack:
        others = [stack.enter_context(_process(run_other_ranks, ranks, part)) for part in (*parts, [last])]
        for pipe in others[:-1]:
            pipe.send("begin")
        _wait_for_registration(range(last))
        began_s = time.time()
        others[-1].send("begin")
        met_s = max(pipe.recv() for pipe in (rank_0, *others)) - began_s
        for pipe in others:
            pipe.recv()
        rank_0.send("all send")
        share = rank_0.recv()
        owner = next(pipe for pipe, part in zip(others, parts, strict=False) if stopped in part)
        owner.send(stopped)
        stopped_s = time.time()
        rank_0.send("one has stopped")
        silent, named_s = rank_0.recv()
        if silent != [stopped]:
            raise SystemExit(f"rank {stopped} has stopped, and {silent} was named")
        rank_0.send("end")
        for pipe in others:
            pipe.send("end")
    return {
        "rendezvous: s from the last rank until all have met": met_s,
        "heartbeats: CPU of rank 0, share of a core": share,
        "heartbeats: s until a rank that stopped is named": named_s - stopped_s,
    }


def _wait_for_registration(ranks: range) -> None:
    """Wait until all these ranks have registered. They then wait for the last one."""
    store = connect()
    while not store.check([host_key(rank) for rank in ranks]):
        time.sleep(0.1)


@contextlib.contextmanager
def _process(function: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """Run a function in a process; yield the pipe to it."""
    context = multiprocessing.get_context("fork")
    own, other = context.Pipe()
    process = context.Process(target=function, args=(*arguments, other))
    process.start()
    try:
        yield own
    finally:
        process.join(30)
        process.kill()


def _launch_files(folder: Path, ranks: int) -> Measured:
    nodes = max(1, ranks // RANKS_PER_NODE)
    folder.mkdir()
    stage = {"stages.0.nodes": nodes, "stages.0.gpus_per_node": RANKS_PER_NODE, "stages.0.global_batch_size": ranks}
    began_s = time.process_time()
    plan = plan_of(folder, {**stage, "scale_test": "off"}, {"partitions.0.max_nodes": nodes})
    files = render_job(plan, JobId(STAGE_KIND, (plan.stages[0].name,)), folder).files
    seconds = time.process_time() - began_s
    longest = max(len(word) for text in files.values() for word in text.split())
    return {
        "plan and launch files: CPU s": seconds,
        "launch files of the stage: bytes": sum(map(len, files.values())),
        "launch files of the stage: longest word, characters": longest,
    }


def _checkpoint(folder: Path, ranks: int) -> Measured:
    """Write a checkpoint of one optimizer file per rank, as ZeRO 1 does, list it, read its manifest and verify rank 0's part."""
    folder.mkdir()
    names = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]
    for rank, name in enumerate(names):
        (folder / name).write_bytes(rank.to_bytes(4, "little") * (CHECKPOINT_BYTES // ranks // 4))
    entries = {name: {"bytes": CHECKPOINT_BYTES // ranks, "blake3": file_blake3(folder / name)} for name in names}
    manifest = manifest_fields(entries, world_size=ranks, zero_stage=1)
    began_s = time.perf_counter()
    write_json(folder / MANIFEST, manifest)
    wrote_s = time.perf_counter()
    files = {folder / name: entry["blake3"] for name, entry in read_manifest(folder)["files"].items()}
    read_s = time.perf_counter()
    listed = len(list(os.scandir(folder)))
    listed_s = time.perf_counter()
    part = dict(own_part(files, SimpleNamespace(rank=SimpleNamespace(rank=0, world_size=ranks))))  # type: ignore[arg-type]
    part_s, all_s = _verify_s(part), _verify_s(files)
    part_bytes = sum(path.stat().st_size for path in part)
    return {
        "checkpoint: files": listed,
        "checkpoint: bytes of the manifest": (folder / MANIFEST).stat().st_size,
        "checkpoint: s to write the manifest": wrote_s - began_s,
        "checkpoint: s to read the manifest": read_s - wrote_s,
        "checkpoint: s to list the folder": listed_s - read_s,
        "checkpoint: files that rank 0 verifies": len(part),
        "checkpoint: s of rank 0 to verify its part": part_s,
        "checkpoint: MB/s that rank 0 verifies of its part": part_bytes / 1e6 / part_s,
        "checkpoint: s if one rank verified all files": all_s,
        "checkpoint: MB/s if one rank verified all files": CHECKPOINT_BYTES / 1e6 / all_s,
        "checkpoint: bytes that rank 0 gathers of all ranks": len(pickle.dumps(entries)),
    }


def _verify_s(files: FileHashes) -> float:
    """Compare files with their hashes, and return the time that it takes."""
    began_s = time.perf_counter()
    if wrong := list(wrong_files(files, file_blake3)):
        raise SystemExit(wrong[0])
    return time.perf_counter() - began_s


def _environment_check(folder: Path, ranks: int) -> Measured:
    """Judge so many healthy nodes, as the first node does with what it has gathered."""
    first = {**two_gpu_nodes()[0], "measured": None, "cpus": 112}
    nodes = [{**first, "host": f"node{number:04d}"} for number in range(max(1, ranks // RANKS_PER_NODE))]
    out = folder / "environment.json"
    job = environment_job(
        nodes=len(nodes),
        checks=Checks(min_disk_free_gb=0.001),
        out=str(out),
        folder=str(folder),
        job_folder=str(folder),
    )
    began_s = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _judge(nodes, job)
    return {
        "environment check: bytes that each node gathers": len(pickle.dumps(first)) * len(nodes),
        "environment check: CPU s of the first node": time.process_time() - began_s,
        "environment check: bytes of environment.json": out.stat().st_size,
        "environment check: lines of the log": printed.getvalue().count("\n"),
    }


def _pair_evidence(nodes: int) -> Measured:
    """Judge the pairs of a complete tournament with one slow node, on all rails, once.

    torch's gather_object fills the part of each rank up to the size of the largest one.
    """
    healthy, budget_s = PairMeasurement(20.0, 30.0, True), 300.0
    pairs = [
        pair
        for number in order_of_rounds(nodes)[: planned_rounds(nodes, budget_s)]
        for pair in pairs_of_round(nodes, number)
    ]
    measured = {
        (rail, *pair): replace(healthy, bandwidth_gbps=2.0) if 1 in pair else healthy
        for rail in range(RANKS_PER_NODE)
        for pair in pairs
    }
    began_s = time.process_time()
    evidence = PairEvidence(measured, 0.7)
    slow = evidence.slow_nodes([f"node{number:04d}" for number in range(nodes)])
    seconds = time.process_time() - began_s
    if [node["host"] for node in slow] != ["node0001"]:
        raise SystemExit(f"node0001 is slow, and {slow} was named")
    # node 0 is the first one in each of its pairs; copies, because pickle writes an object once
    largest = {pair: replace(found) for pair, found in measured.items() if pair[:2] == (0, 0)}
    return {
        "fabric check: pairs on all rails": len(measured),
        "fabric check: CPU s of rank 0 to judge them": seconds,
        "fabric check: bytes that rank 0 gathers": len(pickle.dumps(largest)) * nodes * RANKS_PER_NODE,
    }


if __name__ == "__main__":
    main()
