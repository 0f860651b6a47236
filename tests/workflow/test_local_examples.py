"""The examples without hub access: planned and dry-run as they are, and trained on the CPU with a small model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longhaul.config.init_files import EXAMPLES, copy_start_files, names_in
from longhaul.planning.load_plan import load_plan
from tests.support.local_model import write_local_files

LOCAL = [name for name in names_in(EXAMPLES) if name.startswith("local-")]
WITHOUT_INTERNET = {
    "HF_HUB_OFFLINE": "1",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "PYTHONWARNINGS": "ignore",
}


@pytest.fixture
def config(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of an example, with the files that it names beside it."""
    write_local_files(tmp_path)
    return copy_start_files(request.param, "local-gpus", "mine", tmp_path)[0]


def longhaul(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "longhaul", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **WITHOUT_INTERNET},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_both_examples_exist():
    assert LOCAL == ["local-four-gpu-node", "local-one-gpu"]


@pytest.mark.parametrize("config", LOCAL, indirect=True)
def test_plan_and_dry_run_need_no_hub(config: Path):
    plan = load_plan(config)
    assert not plan.needs_fetch and plan.deferred_checks == ()
    assert {stage.stage.gpus_per_node for stage in plan.stages} <= {1, 4}
    printed = longhaul(config.parent, "run", "mine.yaml", "-n")
    assert "fetch" not in printed and "train" in printed and "export" in printed


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("config", ["local-one-gpu"], indirect=True)
def test_the_example_for_one_gpu_trains_on_the_cpu(config: Path):
    """With the site of this machine, two steps and shorter sequences, everything else as in the example."""
    text = config.read_text()
    for old, new in (
        ("site: ./local-gpus.yaml", "site: local"),
        ("steps: 200", "steps: 2"),
        ("global_batch_size: 32", "global_batch_size: 4"),
        ("sequence_length: 2048", "sequence_length: 128"),
        ("warmup_steps: 10", "warmup_steps: 1"),
        ("export: best", "export: last"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    config.write_text(text + "checks: {min_disk_free_gb: 0.1}\ntrackers: {tensorboard: false}\n")
    longhaul(config.parent, "run", "mine.yaml")
    assert (config.parent / "results/mine/export/sft/latest/model.safetensors").exists()
    longhaul(config.parent, "verify", "mine.yaml")  # exit code 0: no file is missing or damaged
