"""Benchmarks that need a GPU: what they plan is accepted by the plan, also on machines without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.gpu_speed import plan_rows
from bench.gpu_speed_rows import MODELS, ROWS


@pytest.mark.parametrize("model", MODELS)
def test_every_row_of_bench_gpu_can_be_planned(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n')
    rows = [row for row in ROWS if row.model == model]
    stages = [{**row.stage, "name": f"row-{index}", "dataset": "corpus"} for index, row in enumerate(rows)]
    plan = plan_rows(tmp_path, model, stages)
    assert [planned.stage.micro_batch_size for planned in plan.stages] == [
        row.stage["micro_batch_size"] for row in rows
    ]
    assert plan.site.node.gpus == 1
