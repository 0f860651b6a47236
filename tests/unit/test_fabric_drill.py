"""The drill of the two checks, without its cluster: its jobs and its record."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from longhaul.config.load_config import load_config
from longhaul.jobs.launch_files import render_job
from longhaul.planning import build_plan
from tests.cluster.fabric_drill import FABRIC, QUICK_HALF, drill_config, drill_site, healthy_lines, job_of_check
from tests.support.pipeline_run import write_data, write_site
from tests.support.pipeline_run_on_cluster import SITE


def test_healthy_runs_are_recorded_with_median_and_longest_time():
    lines = healthy_lines({FABRIC: [20.0, 24.0, 31.0], QUICK_HALF: [12.0]})
    assert lines[0] == "healthy, fabric: 3 of 20 runs, no alarm; median 24 s, longest 31 s"
    assert lines[1] == "healthy, quick half: 1 of 20 runs, no alarm; median 12 s, longest 12 s"
    assert "180 s" in lines[2] and "60 s" in lines[2]


def test_quick_half_is_that_of_a_training_on_all_hosts(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(drill_config(7, tmp_path)))
    cluster: Any = SimpleNamespace(folder=tmp_path)
    write_data(tmp_path)
    write_site(tmp_path, {**SITE, **drill_site(cluster, 7)})
    plan = build_plan(load_config(tmp_path / "run.yaml"))
    job, report = job_of_check(plan, QUICK_HALF)
    files = render_job(plan, job, tmp_path).files
    kinds = [step["title"] for step in json.loads(files["launch.json"])["steps"]]
    assert len(kinds) == 3, kinds
    spec = json.loads(files["pair_check.json"])
    assert (spec["nodes"], spec["pairs_only"], spec["out"]) == (7, True, str(report))
