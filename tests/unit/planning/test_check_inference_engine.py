"""A site whose inference engine is missing is refused before a job is submitted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from longhaul.config.site_serving_config import ENGINE_PACKAGES
from longhaul.errors import UserError
from longhaul.planning import Plan, check_inference_engine
from tests.support.pipeline_run import REPOSITORY
from tests.support.small_configs import plan_of

CHECK = {"stages.1.export": "last", "stages.1.serve_check": {"streams": [1], "answer_tokens": 16}}


def planned(folder: Path, serving: dict[str, Any]) -> Plan:
    return plan_of(folder, CHECK, {"serving": serving})


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        ({"engine": "vllm", "python": ["/none/python"]}, r"serving\.python: /none/python is no program"),
        ({"engine": "vllm", "python": ["/tmp"]}, r"serving\.python: /tmp is no program"),
        ({"engine": "sglang"}, r"serving\.engine sglang needs the package sglang"),
    ],
)
def test_an_engine_that_is_not_installed_is_refused(tmp_path: Path, serving: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        planned(tmp_path, serving)


def test_the_packages_of_another_python_are_not_looked_for_here(tmp_path: Path):
    for python in ([sys.executable], ["apptainer", "exec", "/images/vllm.sif", "python3"]):
        assert planned(tmp_path, {"engine": "vllm", "python": python}).site.serving.python == tuple(python)


def test_the_default_engine_needs_what_the_extra_installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    present = set(ENGINE_PACKAGES["transformers"])
    monkeypatch.setattr(check_inference_engine, "find_spec", lambda name: name if name in present else None)
    planned(tmp_path / "a", {})
    present.remove("openai")
    with pytest.raises(UserError, match="needs the package openai") as refused:
        planned(tmp_path / "b", {})
    assert refused.value.hint == f"pip install -c {REPOSITORY}/envs/constraints.txt 'longhaul[serve]'"
