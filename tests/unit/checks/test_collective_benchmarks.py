"""Sizes within a time budget, and the bytes that bus bandwidth stands for."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longhaul.checks import collective_benchmarks
from longhaul.checks.collective_benchmarks import (
    COLLECTIVES,
    Collective,
    MeasuredGroup,
    largest_message,
    measure,
    measure_sizes,
)
from tests.support.launch_ranks import REPOSITORY, rank_environment, worker_command

RANKS = 3
CHECKED, WARM_UP = 1, 3
SENDERS = {"broadcast": RANKS - 1, "reduce_scatter": 2 * RANKS}
"""All bytes that a round sends, by those for which bus bandwidth stands; else the number of ranks. In a broadcast all ranks but
one receive the buffer once. gloo's reduce_scatter is an all_reduce, which sends twice the bytes that are needed."""


def row(collective: str, size: int, time_us: float = 10.0, bus: float = 1.0, correct: bool = True) -> dict[str, Any]:
    return {
        "collective": collective,
        "scope": "node",
        "bytes": size,
        "rounds": 10,
        "time_us": time_us,
        "bus_bandwidth_gbps": bus,
        "correct": correct,
    }


def test_bus_bandwidth_equals_the_bytes_that_the_interface_sent_by_the_time():
    """Three ranks in a network of their own. The interface counts what they send, and another clock the time, within 5 %."""
    worker = Path(__file__).parents[2] / "support" / "collective_bytes_worker.py"
    own_network = ["unshare", "--net", *(() if os.geteuid() == 0 else ("--map-root-user",))]
    command = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", *worker_command(worker, RANKS)]
    environment = {**rank_environment(), "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = f"{REPOSITORY / 'workflow'}:{REPOSITORY}"
    done = subprocess.run(
        [*own_network, *command], capture_output=True, text=True, check=False, timeout=180, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["collective"] for row in rows] == [collective.name for collective in COLLECTIVES]
    for found in rows:
        assert found["correct"]
        assert found["time_us"] / 1e6 == pytest.approx(found["seconds"], rel=0.05), found
        bus_bytes = found["sent_bytes"] / SENDERS.get(found["collective"], RANKS)
        assert found["bus_bandwidth_gbps"] == pytest.approx(bus_bytes / found["seconds"] / 1e9, rel=0.05), found


def test_sizes_end_when_the_next_one_would_not_fit_into_the_budget(monkeypatch: pytest.MonkeyPatch):
    """A link of 1 MB/s: 1 MiB takes 1 s and 10 rounds; 16 MiB would take 16 s and at least 12 rounds."""
    measured: list[int] = []

    def measure(collective: Collective, group: MeasuredGroup, size_bytes: int) -> Any:
        measured.append(size_bytes)
        return row(collective.name, size_bytes, time_us=float(size_bytes))

    monkeypatch.setattr(collective_benchmarks, "measure", measure)
    group = MeasuredGroup(0, 2, torch.device("cpu"))
    sizes = [8, 2**10, 2**20, 2**24, 2**26]
    for budget_s, expected in ((30.0, 3), (500.0, 4), (1e4, 5), (0.0, 3)):
        measured.clear()
        found = list(measure_sizes(COLLECTIVES[0], group, sizes, budget_s))
        assert [one["bytes"] for one in found] == measured == sizes[:expected]


def test_one_round_is_checked_before_rounds_are_timed(monkeypatch: pytest.MonkeyPatch):
    """Rounds one by one take 1, 2, … 10 ms; the 95th percentile by the nearest rank is the tenth (ceil(0.95 x 10))."""
    rounds: list[str] = []

    def seconds(group: MeasuredGroup, run_once: Callable[[], object], count: int) -> float:
        for _ in range(count):
            run_once()
        singles = len(rounds) - (CHECKED + WARM_UP + 40)
        return 0.001 * singles if count == 1 else 0.005

    def is_correct() -> bool:
        return rounds == ["round"]

    monkeypatch.setattr(collective_benchmarks, "_seconds", seconds)
    monkeypatch.setattr(collective_benchmarks, "_slowest", lambda group, values: values)
    monkeypatch.setattr(collective_benchmarks, "_all_agree", lambda group, value: value)
    prepared = (lambda: rounds.append("round"), is_correct)
    found = measure(Collective("one", lambda *_: prepared, lambda n: 1.0), MeasuredGroup(0, 2, torch.device("cpu")), 64)
    assert found["correct"] and found["rounds"] == len(rounds) == CHECKED + WARM_UP + 40 + 10
    assert (found["time_us"], found["median_us"], found["p95_us"]) == (5000.0, 5500.0, 10000.0)
    assert (found.get("min_us"), found.get("p99_us"), found.get("max_us")) == (1000.0, 10000.0, 10000.0)


def test_slowest_of_100_rounds_is_beyond_the_99th_percentile(monkeypatch: pytest.MonkeyPatch):
    """A fast collective is timed 100 times one by one; they take 1, 2, … 100 us, in any order."""
    singles = iter([*range(100, 50, -1), *range(1, 51)])
    monkeypatch.setattr(collective_benchmarks, "_seconds", lambda *_: 1e-6 * (next(singles) if _[-1] == 1 else 10))
    monkeypatch.setattr(collective_benchmarks, "_slowest", lambda group, values: values)
    monkeypatch.setattr(collective_benchmarks, "_all_agree", lambda group, value: value)
    prepared = (lambda: None, lambda: True)
    found = measure(Collective("one", lambda *_: prepared, lambda n: 1.0), MeasuredGroup(0, 2, torch.device("cpu")), 64)
    spread = [found.get(name) for name in ("min_us", "median_us", "p95_us", "p99_us", "max_us")]
    assert spread == [1.0, 50.5, 95.0, 99.0, 100.0]


def test_size_below_the_smallest_shared_message_is_not_measured_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collective_benchmarks, "measure", lambda one, group, size: row(one.name, max(size, 1024)))
    group = MeasuredGroup(0, 256, torch.device("cpu"))
    assert [one["bytes"] for one in measure_sizes(COLLECTIVES[0], group, [8, 512, 4096], 9.0)] == [1024, 4096]


def test_sums_of_8192_ranks_have_no_rounding_that_looks_like_wrong_values(monkeypatch: pytest.MonkeyPatch):
    """Ranks that add 1 to 8,192 would exceed 2^24, above which fp32 holds no odd number."""
    ranks, device = 8192, torch.device("cpu")
    prepare = {collective.name: collective.prepare for collective in COLLECTIVES}
    total = torch.zeros(1)
    monkeypatch.setattr(
        collective_benchmarks.dist, "all_reduce", lambda buffer, group: buffer.copy_(total.add_(buffer))
    )
    prepared = [prepare["all_reduce"](MeasuredGroup(rank, ranks, device), 1) for rank in range(ranks)]
    for run_once, _ in prepared:
        run_once()
    assert prepared[-1][1]() and total.item() > 4 * (ranks - 7)


def test_sums_that_8192_ranks_scatter_have_none_either(monkeypatch: pytest.MonkeyPatch):
    """All ranks send the same; this one gets the sum of one part."""
    rank, ranks = 8190, 8192

    def add(part: torch.Tensor, whole: torch.Tensor, group: object) -> None:
        part.zero_()
        for _ in range(ranks):
            part += whole[rank]

    monkeypatch.setattr(collective_benchmarks, "_reduce_scatter_single", add)
    prepare = next(collective.prepare for collective in COLLECTIVES if collective.name == "reduce_scatter")
    run_once, is_correct = prepare(MeasuredGroup(rank, ranks, torch.device("cpu")), ranks)
    run_once()
    assert is_correct()


def test_rank_that_waits_for_the_free_memory_of_others_says_so(monkeypatch: pytest.MonkeyPatch):
    """The step before reads error counters, whose remedy is that of a driver."""
    steps: list[str] = []
    monkeypatch.setattr(collective_benchmarks, "announce", lambda text, gpus, subject: steps.append(text))
    monkeypatch.setattr(collective_benchmarks.dist, "all_reduce", lambda *_, **options: steps.append("waits"))
    largest_message(MeasuredGroup(0, 2, torch.device("cpu")))
    assert steps == ["free memory of the ranks", "waits"]
