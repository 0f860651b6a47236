"""A small evaluation task with local data: six questions, of which the right answer has the words of the training data."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

TASK = "follows"
QUESTIONS = [{"question": f"What follows {n}?", "choices": [f"After {n}", "the"], "label": 0} for n in range(6)]


def write_task(folder: Path) -> Path:
    """Write the task's file and its data; return the path of the task's file."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    path = folder / f"{TASK}.yaml"
    path.write_text(yaml.safe_dump(task))
    return path
