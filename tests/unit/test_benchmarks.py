"""Benchmarks: the plan accepts the stages of those that need a GPU, also on machines without one. All workers can be started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import scale, status
from bench.fabric_cost import AIM_S, RoundTimes, simulate_pairs
from bench.gpu_speed import loss_table, plan_stages
from bench.gpu_speed_rows import MODELS, ROWS
from bench.kernel_times import IDLE, times_by_class
from bench.machine import MODULE_PATH, REPOSITORY
from bench.scale import growth
from longhaul.train.monitoring.kernel_classes import COPY, MATRIX

BENCH = REPOSITORY / "bench"


def test_a_file_that_is_started_by_its_path_imports_nothing_of_this_repository():
    """Python then searches its imports in bench/ alone. The others are started with -m and MODULE_PATH."""
    text = "\n".join(path.read_text() for path in BENCH.glob("*.py"))
    started = {BENCH / name for name in re.findall(r"(?:HERE / |with_name\()\"(\w+\.py)\"", text)}
    assert len(started) == 2, started
    for path in started:
        assert not re.search(r"^from (bench|tests)\b", path.read_text(), re.MULTILINE), path
    assert not re.search(r"sys\.executable, __file__", text)


def test_modules_that_are_started_with_m_are_found_in_any_folder(tmp_path: Path):
    text = "\n".join(path.read_text() for path in BENCH.glob("*.py"))
    modules = set(re.findall(r"\"-m\",\s*\"(bench\.\w+)\"", text))
    assert modules >= {f"bench.{path.stem}" for path in BENCH.glob("*_worker.py")} | {"bench.convert"}
    find = "import importlib.util, sys; print(*filter(importlib.util.find_spec, sys.argv[1:]))"
    command, environment = [sys.executable, "-c", find, *modules], {**os.environ, **MODULE_PATH}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert set(found.stdout.split()) == modules


@pytest.mark.parametrize("group", sorted({row.group for row in ROWS}))
def test_every_row_of_bench_gpu_can_be_planned(group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("corpus", "sources", "chats"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    rows = [row for row in ROWS if row.group == group]
    stages = [{**row.stage, "name": f"row-{index}", "dataset": row.dataset} for index, row in enumerate(rows)]
    plan = plan_stages(tmp_path, MODELS[rows[0].model], stages, rows[0].gpus)
    assert plan.site.interconnect.nvlink_multicast == "off"
    assert [planned.stage.micro_batch_size for planned in plan.stages] == [
        row.stage["micro_batch_size"] for row in rows
    ]
    assert {planned.world_size for planned in plan.stages} == {plan.site.node.gpus} == {rows[0].gpus}


def test_a_benchmark_can_be_planned_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n')
    row = next(row for row in ROWS if row.model == "losses")
    stage = {**row.stage, "name": "start", "dataset": "corpus", "precision": "fp32"}
    assert plan_stages(tmp_path, MODELS["losses"], [stage]).stages[0].world_size == 1


def test_losses_are_compared_with_those_of_the_other_plain_runs():
    plain = [row.name for row in ROWS if row.plain and row.group == "losses"]
    losses = {name: [5.0 + 0.01 * number, 4.0] for number, name in enumerate(plain)}
    header, _, *lines, last = loss_table({**losses, "losses/longhaul": [5.0, 4.5]})
    assert header.startswith("losses of 2 steps")
    assert [line.endswith(", plain") for line in lines] == [True] * 5 + [False]
    assert "mean 0.01250, largest 0.04000, last 20 steps 4.5000" in lines[0]  # (1 + 2 + 3 + 4) / 100 / 4 / 2 steps
    assert "mean 0.26000, largest 0.50000, last 20 steps 4.7500" in lines[-1]
    assert last == "the largest mean of a plain run is 0.01250"
    *_, exact, _, last = loss_table({**losses, "losses/longhaul": [5.0, 4.5], "losses/longhaul, fp32": [5.0, 4.0]})
    assert "mean 0.26000, largest 0.50000, mean 0.25000 from fp32, last 20 steps" in exact
    assert last == "the largest mean of a plain run is 0.01250"
    assert loss_table({"losses/longhaul": [5.0, 4.5]})[-1].endswith(
        "no plain run to compare with, last 20 steps 4.7500"
    )


def test_time_without_a_kernel_is_idle():
    spans = [("Memcpy DtoD", 10.0, 14.0), ("nvjet_a", 12.0, 20.0), ("nvjet_b", 25.0, 26.0), ("nvjet_a", 26.0, 27.0)]
    classes, kernels = times_by_class(spans)
    assert (classes[COPY], classes[MATRIX], classes[IDLE]) == (4.0, 10.0, 5.0)
    assert kernels == {"Memcpy DtoD": 4.0, "nvjet_a": 9.0, "nvjet_b": 1.0}


def test_a_round_takes_as_long_as_its_slowest_pair_and_the_budget_ends_a_tournament():
    times = RoundTimes([0.5], {8: 0.0})
    assert simulate_pairs(8, 300.0, times) == ((7 + 48) * 0.5 + 12, 7), (
        "three repetitions of 16 rounds, and their pauses"
    )
    assert simulate_pairs(1000, 10.0, times) == ((21 + 48) * 0.5 + 12, 21)
    assert simulate_pairs(1000, 0.0, times)[1] == 8, "with fewer rounds, a node could meet mostly slow ones"
    assert RoundTimes([0.5], {2: 0.1, 8: 0.2}).start_of(1000) == 25.0
    two = RoundTimes([0.1, 2.0], {8: 0.0})
    assert simulate_pairs(512, 0.0, two)[0] == pytest.approx(2.0 * (8 + 48) + 12)


def test_recorded_simulation_of_a_thousand_nodes_ends_within_fifteen_minutes():
    (line,) = [
        line for line in (BENCH / "results/fabric_cost.txt").read_text().splitlines() if line.startswith(" 1,000")
    ]
    assert int(line.split()[7]) <= AIM_S


def test_growth_is_the_exponent_between_the_two_largest_numbers_of_ranks():
    assert growth((64, 512, 4096), [9.0, 2.0, 16.0]) == pytest.approx(1.0)
    assert growth((64, 512, 4096), [1.0, 3.0, 3.0]) == 0.0 == growth((64, 512, 4096), [1.0, 0.0, 3.0])


def test_simulated_ranks_have_the_files_and_tables_of_their_number(tmp_path: Path):
    small, large = (
        {
            **scale._launch_files(tmp_path / f"launch{ranks}", ranks),
            **scale._checkpoint(tmp_path / f"checkpoint{ranks}", ranks),
            **scale._environment_check(tmp_path, ranks),
            **scale._pair_evidence(ranks // 8),
            **scale.measure_records(tmp_path / f"run{ranks}", ranks),
        }
        for ranks in (32, 64)
    )
    ratio = {name: large[name] / small[name] for name in small if not re.search(r"\bs\b", name)}
    assert ratio["checkpoint: files"] == 65 / 33 and ratio["checkpoint: files that rank 0 verifies"] == 1.0
    assert ratio["checkpoint: bytes of the manifest"] == pytest.approx(2.0, rel=0.05)
    assert ratio["environment check: bytes that each node gathers"] == 2.0
    assert ratio["fabric check: bytes that rank 0 gathers"] > 2.5, "ranks times pairs of a rank"
    assert ratio["fabric check: pairs on all rails"] == (8 * 7) / (4 * 3)
    assert ratio["records: bytes of node_results.jsonl per check"] == pytest.approx(2.0, rel=0.01)
    assert 1.0 < ratio["records: bytes of attempts.jsonl per attempt"] < 2.0, "one host name more per node"
    assert ratio["records: bytes of metrics.jsonl per step"] == pytest.approx(1.0, rel=0.05)
    assert ratio["launch files of the stage: bytes"] == pytest.approx(1.0, rel=0.01)


def test_failed_rank_is_named_among_the_reports_of_all(tmp_path: Path):
    assert scale.measure_failed_rank(tmp_path, 8)


def test_recorded_scale_meets_its_aims():
    text = (BENCH / "results/scale.txt").read_text()
    rows = {
        name.strip(): values.split()
        for name, values in re.findall(r"^(.{62})((?: +[\d.,e+-]+){5})$", text, re.MULTILINE)
    }
    assert len(rows) == 32, "every measurement at three numbers of ranks, one calculated, and the exponent"
    at_4096 = {name: float(values[2].replace(",", "")) for name, values in rows.items()}
    assert at_4096["rendezvous: s from the last rank until all have met"] <= 30
    assert at_4096["heartbeats: CPU of rank 0, share of a core"] <= 0.05
    assert at_4096["heartbeats: s until a rank that stopped is named"] <= scale.HEARTBEAT_TIMEOUT_S + 10
    assert at_4096["checkpoint: files that rank 0 verifies"] == 1


def test_recorded_status_of_a_thousand_stages_and_the_main_process_meet_their_aims():
    text = (BENCH / "results/status.txt").read_text()
    (of_many,) = re.findall(
        r"^1,000 stages .*\n  longhaul status: ([\d.]+) s,.* calls of squeue: (\S+)$", text, re.MULTILINE
    )
    assert float(of_many[0]) <= status.AIM_S and of_many[1] == "1"
    loads = re.findall(r"^  (display|main process)\b.*: ([\d.]+)% of a core over \d+ s$", text, re.MULTILINE)
    assert [subject for subject, _ in loads] == ["display", "display", "main process"]
    assert all(float(percent) / 100 < status.AIM_SHARE for _, percent in loads)
