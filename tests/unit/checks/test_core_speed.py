"""The speed of the job's cores: measured, compared between nodes, repeated before a node is named."""

from __future__ import annotations

import os
import time

import pytest

from longhaul.checks import core_speed
from longhaul.checks.core_speed import CoreSpeed, core_speed_rows, is_judged, measure_all_nodes, measure_slowest_core
from longhaul.checks.hardware_checks import hardware_rows
from tests.support.healthy_node_facts import HEALTHY_CORES, environment_job
from tests.unit.checks.test_hardware_checks import nodes

FAST, SLOW = HEALTHY_CORES, CoreSpeed(core=7, rate=0.1, run_share=0.04)


def results(speeds: list[CoreSpeed], owns_cores: bool = True) -> list[str]:
    by_node = {f"n{number}": speed for number, speed in enumerate(speeds, start=1)}
    return [row["result"] for row in core_speed_rows(by_node, owns_cores)]


def test_the_environment_check_fails_the_node_whose_core_is_slow():
    found = nodes()
    found[1]["core_speed"] = SLOW
    (row,) = (row for row in hardware_rows(found, environment_job()) if row["result"] == "fail")
    assert (row["node"], row["check"]) == ("n2", "slowest core of the job")
    assert row["value"] == "0.1 million hashes/s by core 7, which ran 4% of the time"
    assert "nr_throttled" in row["remedy"]


@pytest.mark.parametrize(
    ("last", "on_gpu_node", "on_virtual_host"),
    [
        (SLOW, "fail", "fail"),
        (CoreSpeed(3, 1.2, 1.0), "warn", "ok"),  # low clocks
        (CoreSpeed(3, 1.9, 0.7), "warn", "ok"),  # another process, at turbo clocks
        (FAST, "ok", "ok"),
    ],
)
def test_share_of_the_median_decides(last: CoreSpeed, on_gpu_node: str, on_virtual_host: str):
    assert results([FAST, FAST, FAST, last]) == ["ok"] * 3 + [on_gpu_node]
    assert results([FAST, FAST, FAST, last], owns_cores=False) == ["ok"] * 3 + [on_virtual_host]


def test_two_nodes_are_not_compared_but_a_core_that_is_not_the_jobs_alone_is_shown():
    assert results([FAST, CoreSpeed(0, 0.1, 1.0)]) == ["ok", "ok"]
    assert results([FAST, SLOW]) == ["ok", "warn"]
    assert results([SLOW], owns_cores=False) == ["ok"]


def test_a_node_that_was_slow_for_a_moment_is_not_named(monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    monkeypatch.setattr(core_speed.time, "sleep", pauses.append)
    rounds = iter([[FAST, FAST, SLOW], [FAST, FAST, SLOW], [SLOW, FAST, FAST]])
    found = measure_all_nodes(lambda own: next(rounds), lambda: FAST)
    assert found == [FAST, FAST, FAST] and pauses == [0.0, 2.0]


def test_a_core_that_does_not_work_for_the_job_is_slow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(core_speed.hashlib, "pbkdf2_hmac", lambda *arguments: time.sleep(0.6))
    found = measure_slowest_core()
    assert found.rate < 0.01 and found.run_share < 0.2


def test_a_run_on_one_or_two_nodes_without_gpus_measures_nothing():
    """Nothing would be judged."""
    judged = [is_judged(nodes, owns_cores) for nodes, owns_cores in ((1, False), (2, False), (3, False), (1, True))]
    assert judged == [False, False, True, True]
    found = [{key: value for key, value in node.items() if key != "core_speed"} for node in nodes()]
    assert "slowest core of the job" not in [row["check"] for row in hardware_rows(found, environment_job())]


def test_a_core_that_the_kernel_pins_no_thread_to_is_measured(monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(core_speed.os, "sched_setaffinity", refuse)
    assert measure_slowest_core().rate > 0


def test_the_measurement_leaves_the_cores_of_the_process_as_they_were():
    before = os.sched_getaffinity(0)
    assert measure_slowest_core().core in before
    assert os.sched_getaffinity(0) == before
