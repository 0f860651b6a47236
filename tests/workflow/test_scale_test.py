"""The scale test as a job of a run: before the first stage trains, never again after that, and its limits end the run."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pipeline_run import PipelineRun


@pytest.fixture
def run(finished: PipelineRun) -> Iterator[PipelineRun]:
    """The finished run, which had a scale test on its one node. A test may change its config, which is restored afterwards."""
    before = copy.deepcopy(finished.config)
    yield finished
    finished.config = before
    finished.save()


def test_it_ran_before_the_first_stage_and_is_in_the_report(run: PipelineRun):
    report = run.read("scale_test/1.json")
    assert report["problems"] == [] and report["nodes"] == 1 and report["step_time_s"] > 0
    (begun,) = (run.results / "stages/base").glob("weights/*/identity.json")
    assert (run.results / "scale_test/1.json").stat().st_mtime < begun.stat().st_mtime
    page = (run.results / "report.html").read_text()
    assert 'id="scale-test"' in page and "within the limits" in page
    assert not (run.results / "jobs/scale_test-1/discarded").exists()


@pytest.mark.parametrize("value", ["off", {"nodes": ["full"], "min_efficiency": 0.1}, [1]])
def test_stage_that_has_trained_is_not_tested_again(run: PipelineRun, value: object):
    run.config["scale_test"] = value
    run.save()
    assert set(run.would_run()) <= {"render", "report"}


def test_stage_that_trains_again_is_tested_again(run: PipelineRun):
    run.config["stages"][0]["optimizer"]["lr"] = 0.001
    run.save()
    assert run.would_run()["scale_test"] == 1


def test_missed_limit_ends_the_run_with_its_name(finished: PipelineRun, tmp_path: Path):
    shutil.copytree(finished.folder, tmp_path / "copy", symlinks=True)
    run = copy.deepcopy(finished)
    run.folder = tmp_path / "copy"
    run.config["scale_test"] = {"nodes": ["full"], "max_step_time_spread": 1e-9}
    run.save()
    done = run.snakemake("results/tiny/scale_test/1.json")
    text = done.stdout + done.stderr + run.logs()
    assert done.returncode != 0 and "spread of the step times on 1 node: " in text
    assert "(scale_test.max_step_time_spread)" in text and "set scale_test: off" in text
    assert (run.results / "scale_test/1.json.failed.json").exists()
