"""The tests and benchmarks of GPUs, on a machine without one: the files can be imported, and the plan accepts their stages."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from longhaul.config.load_config import load_config
from longhaul.planning import build_plan
from tests.parity.parity_cases import MODELS
from tests.support.pipeline_run import REPOSITORY, tiny_config, write_data

FILES = sorted(path.stem for path in (REPOSITORY / "tests/gpu").glob("*.py") if path.stem != "__init__")
# test file -> names of its sets of stages, model (None: that of tiny_config)
STAGES: dict[str, tuple[tuple[str, ...], dict[str, Any] | None]] = {
    "test_layouts_on_gpus": (("VARIANTS",), MODELS["deepseek_v3"]),
    "test_resharding_on_gpus": (("FIRST", "SECOND"), MODELS["deepseek_v3"]),
    "test_whole_run_on_gpus": (("RUN",), None),
}


def load(name: str) -> Any:
    with mock.patch.dict(os.environ):  # the package sets variables of NCCL
        return importlib.import_module(f"tests.gpu.{name}")


@pytest.mark.parametrize("name", FILES)
def test_every_file_can_be_imported(name: str):
    assert load(name).__doc__


def test_every_file_with_stages_is_planned_here():
    using = {name for name in FILES if "run_variants(" in (REPOSITORY / f"tests/gpu/{name}.py").read_text()}
    assert using - {"runs_on_gpus"} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_the_plan_accepts_the_stages(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gpus, module = load("runs_on_gpus"), load(name)
    monkeypatch.setattr(gpus, "GPUS", 2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: SimpleNamespace(total_memory=80 * 2**30))
    write_data(tmp_path)
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(gpus.this_site()))
    sets, model = STAGES[name]
    for variants in sets:
        stages = gpus.stages_of(getattr(module, variants))
        config = tiny_config(**({"model": model} if model else {})) | {"stages": stages}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        plan = build_plan(load_config(tmp_path / "run.yaml"))
        assert {planned.name for planned in plan.stages} == {stage["name"] for stage in stages}
        assert {planned.world_size for planned in plan.stages} == {2}
