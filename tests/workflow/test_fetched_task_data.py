"""Rules pin what a config and its evaluation tasks name on the hub: a task that is added later pins nothing else again."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import yaml

from longhaul.artifacts.task_data_lock import TaskDataLock
from tests.support.fake_hub import COMMIT, Hub
from tests.support.pipeline_run import PipelineRun, job_counts, tiny_config

STDLIB = {"kind": "text", "python_stdlib": {"max_mb": 1}, "validation_fraction": 0.1}
TASK = {
    "dataset_path": "org/quiz",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "chrf"}],
}
LOCK, TASK_DATA = "results/tiny.lock.json", "results/tiny/task_data/chat"


class HubRun(PipelineRun):
    """A run whose lock has the demo's text, and whose last stage is evaluated on tasks with data of a hub on this machine."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        config = tiny_config()
        config["datasets"]["prose"] = copy.deepcopy(STDLIB)
        super().__init__(folder, config)
        self._variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
        for name in ("first", "second"):
            self.write_task(name)

    def environment(self) -> dict[str, str]:
        offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        return {key: value for key, value in super().environment().items() if key not in offline} | self._variables

    def write_task(self, name: str, **changes: str) -> None:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump({**TASK, "task": name, **changes}))

    def evaluate(self, *tasks: str) -> None:
        self.config["stages"][1]["evaluate"] = {"tasks": list(tasks), "files": [f"{task}.yaml" for task in tasks]}
        self.save()

    def would_fetch(self, *tasks: str) -> dict[str, int]:
        """Return rule -> number of jobs of a dry run up to the locks of the run and of these tasks."""
        return job_counts(self.dry_run(LOCK, *(f"{TASK_DATA}/{task}.json" for task in tasks)))


def test_a_task_that_is_added_pins_nothing_else_again(tmp_path: Path):
    served = tmp_path / "served/datasets/org/quiz/data/test-00000-of-00001.jsonl"
    served.parent.mkdir(parents=True)
    served.write_text('{"question": "1+1", "answer": "2"}\n')
    with Hub(tmp_path / "served") as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        run = HubRun(tmp_path / "run", hub)
        run.evaluate("first")
        run.run(LOCK, f"{TASK_DATA}/first.json")
        hub.shutdown()
    (data,) = TaskDataLock.read(run.folder / TASK_DATA / "first.json").datasets
    assert data["revision"] == COMMIT and (run.folder / data["path"] / "dataset_dict.json").exists()
    assert run.would_fetch("first") == {}
    run.write_task("first", doc_to_text="another prompt")
    assert run.would_fetch("first") == {}
    run.evaluate("first", "second")
    assert run.would_fetch("first", "second") == {"fetch_task_data": 1}
    run.write_task("first", dataset_name="another")
    run.evaluate("first")
    assert run.would_fetch("first") == {"fetch_task_data": 1}
