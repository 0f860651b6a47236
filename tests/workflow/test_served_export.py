"""The rules `serve_check` and `evaluate` start an engine that serves a finished stage's export; the report shows the check."""

from __future__ import annotations

import copy
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longhaul.artifacts.evaluation_result import EvaluationResult
from longhaul.artifacts.serve_check_result import ServeCheckResult
from tests.support import bigram_vllm
from tests.support.evaluation_task import QUESTIONS, TASK, write_task
from tests.support.pipeline_run import PipelineRun, local_site, write_site

SERVING = {"engine": "vllm", "python": [sys.executable, bigram_vllm.__file__], "environment": {"SERVE_EXPORT": "1"}}


@pytest.fixture
def run(finished: PipelineRun, tmp_path: Path) -> Iterator[PipelineRun]:
    """The finished run. A copy replaces it afterwards, as other tests need one without these jobs."""
    config = copy.deepcopy(finished.config)
    before = shutil.copytree(finished.folder, tmp_path / "before", symlinks=True)
    yield finished
    finished.config = config
    shutil.rmtree(finished.folder)
    shutil.move(before, finished.folder)


def test_rules_check_and_evaluate_a_served_export(run: PipelineRun):
    """The engine computes with the weights of the export."""
    write_site(run.folder, {**local_site(), "serving": SERVING})
    task = write_task(run.folder)
    run.config["stages"][0].update(
        serve_check={"streams": [1, 4], "answer_tokens": 4},
        evaluate={"tasks": [TASK], "files": [task.name], "engine": "server"},
    )
    run.save()
    assert run.would_run() == {"render": 1, "serve_check": 1, "evaluate": 1, "report": 1}
    run.run()
    checked = ServeCheckResult.read(run.results / "serve_check/base.json")
    assert (checked.stage, checked.engine, checked.path) == ("base", "vllm", run.read("export/base.json")["path"])
    largest, bound = checked.agreement["largest_difference"], checked.agreement["largest_bound"]
    assert largest is not None and bound is not None and largest <= bound and checked.agreement["compared"] > 50
    assert [step["streams"] for step in checked.load] == [1, 4] and checked.refuses_other_keys
    evaluated = EvaluationResult.read(run.results / "evaluation/base/trained" / f"{TASK}.json")
    assert evaluated.settings["engine"] == "vllm 0.0" and evaluated.scores[0]["documents"] == len(QUESTIONS)
    section = re.search(r'<section id="serving">.*?</section>', (run.results / "report.html").read_text(), re.DOTALL)
    assert section and "<h3>base</h3>" in section[0] and checked.listens_at[0] in section[0]
    assert run.would_run() == {}
