"""An evaluation through vLLM gives the scores of an evaluation with transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.evaluation_result import EvaluationResult
from longhaul.config.serve_config import Serve
from longhaul.config.site_serving_config import Serving
from longhaul.evaluation.evaluate_model import run
from longhaul.jobs.kinds.evaluate_job import EvaluateSpec
from tests.serve.conftest import ENGINES, manifest_of

QUESTIONS = [
    {"question": f"What is {n}?", "choices": ["odd", f"the number {n}", "one"], "label": n % 3, "answer": "one"}
    for n in range(20)
]
TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
}
# brier_score depends on the probability of every choice, and chrF on every character of an answer.
CHOICE = {
    **TASK,
    "task": "choice",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}],
}
ANSWER = {
    **TASK,
    "task": "answer",
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"max_gen_toks": 8, "do_sample": False, "until": []},
    # An answer may end within a character of several bytes. transformers then writes U+FFFD, and vLLM nothing.
    "filter_list": [
        {
            "name": "whole",
            "filter": [{"function": "regex", "regex_pattern": r"^([\s\S]*?)\ufffd*$"}, {"function": "take_first"}],
        }
    ],
    "metric_list": [{"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}],
}
VLLM = Serving(
    engine="vllm",
    python=(ENGINES["vllm"],),
    options=("--enforce-eager",),
    environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
)


def score(folder: Path, export: Path, keys: dict[str, Any], serving: Serving | None) -> float:
    """Evaluate an export on QUESTIONS, and return the score."""
    data, out = folder / "rows.jsonl", folder / "result.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    run(
        EvaluateSpec(
            run="small",
            stage="main",
            model="trained",
            task=keys["task"],
            export=str(export),
            pretrained=None,
            own_task={**keys, "dataset_kwargs": {"data_files": {"test": str(data)}}},
            data_files=(str(data),),
            task_data=None,
            limit=None,
            num_fewshot=0,
            batch_size=4,
            seed=1,
            chat=False,
            gpus=1,
            serving=serving,
            serve=Serve(start_timeout_s=300),
            dtype="fp32",
            nodes=1,
            tensor=1,
            pipeline=1,
            context_tokens=128,
            out=str(out),
        )
    )
    return EvaluationResult.read(out).scores[0]["value"]


@pytest.mark.parametrize("keys", [CHOICE, ANSWER], ids=["choice", "answer"])
def test_vllm_and_transformers_give_the_same_score(
    keys: dict[str, Any], exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    export = manifest_of(exports["llama"])
    served, computed = (score(tmp_path, export, keys, serving) for serving in (VLLM, None))
    assert math.isfinite(served) and served == pytest.approx(computed, abs=1e-3) and served > 0
