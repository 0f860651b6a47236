"""Jobs run in a container. tests/support/apptainer replaces Apptainer and shows only the image and the bound folders;
tests/support/pyxis/srun replaces srun with pyxis.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from longhaul.jobs import container
from longhaul.jobs.launch_files import write_launch_files
from longhaul.planning import Plan
from tests.support.corpora import make_tokenizer
from tests.support.pipeline_run import REPOSITORY, write_data
from tests.support.pipeline_run_on_cluster import fake_image
from tests.support.small_configs import LLAMA, STAGE, plan_of

SUPPORT = REPOSITORY / "tests" / "support"
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="tests/support/apptainer mounts folders, which needs root"),
    pytest.mark.skipif(not shutil.which("unshare"), reason="no unshare (util-linux)"),
]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return planned(tmp_path, {"scheduler": "local"}, {"kind": "container", "path": str(image(tmp_path))})


def image(folder: Path) -> Path:
    (folder / "images").mkdir()
    return fake_image(folder / "images")


def planned(tmp_path: Path, site: dict[str, Any], software: dict[str, Any]) -> Plan:
    """Return a plan whose files are each in another folder outside the run's folder; the data is behind a link."""
    for name in ("corpus", "data", "templates", "evaluation"):
        (tmp_path / name).mkdir()
    write_data(tmp_path / "corpus")
    (tmp_path / "data" / "prose.jsonl").symlink_to(tmp_path / "corpus" / "prose.jsonl")
    (tmp_path / "evaluation" / "quiz.jsonl").write_text('{"text": "of this no document holds a run"}\n')
    tokenizer = make_tokenizer(tmp_path / "tokenizers", [tmp_path / "corpus" / "prose.jsonl"])
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "model")
    (tmp_path / "templates" / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    config = {
        "storage": {name: str(tmp_path / "storage" / name) for name in ("weights", "data", "scratch")},
        "tokenizer": {"path": tokenizer.path, "chat_template": str(tmp_path / "templates" / "chat.jinja")},
        "datasets": {
            "prose": {
                "kind": "text",
                "files": [str(tmp_path / "data" / "*.jsonl")],
                "validation_fraction": 0.1,
                "decontaminate": {"files": [str(tmp_path / "evaluation" / "*.jsonl")], "ngram_words": 5},
            }
        },
        "model": {"pretrained": {"path": str(tmp_path / "model")}},
        "checks": {"nodes": 1, "min_disk_free_gb": 0.01},
        "trackers": {"tensorboard": False},
        "stages": [{**STAGE, "steps": 2, "global_batch_size": 2, "export": "last", "export_dtype": "fp32"}],
    }
    partition = {"jobs": ["gpu"], "max_minutes": 60, "node": {"cpus": 2, "memory_mb": 1000}}
    site = {"partitions": [partition], "accelerator": "cpu", "software": software, **site}
    return plan_of(tmp_path / "config", config, site)


def launch(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{SUPPORT}:{os.environ['PATH']}"}
    command = ["bash", str(folder / "launch.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_jobs_see_all_files_that_they_read_and_write(tmp_path: Path, plan: Plan):
    work = tmp_path / "work"
    write_launch_files(plan, work)
    for name in ("jobs/tokenizer", "jobs/tokenize-prose", "stages/base", "jobs/export-base"):
        done = launch(work / "results" / "small" / name)
        assert done.returncode == 0, (name, (done.stdout + done.stderr)[-3000:])
    assert list((tmp_path / "storage" / "data").rglob("*.bin")), "shards are below storage.data"
    assert list((tmp_path / "storage" / "weights").rglob("manifest.json")), "checkpoints are below storage.weights"
    assert json.loads((work / "results" / "small" / "export" / "base.json").read_text())["parameters"] > 0


def run_step(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the step of a job as launch.sh does, without Slurm. command: what to run in its container instead of the job"""
    words = json.loads((folder / "launch.json").read_text())["steps"][0]["command"]
    step = [*words[: words.index("python3")], *command] if command else words
    exports = (folder / "launch.sh").read_text().partition("# The supervisor")[0]
    path = f"{SUPPORT / 'pyxis'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", f"{exports}\nexec {shlex.join(step)}"],
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_steps_in_a_pyxis_container_see_their_files_and_the_jobs_variables(tmp_path: Path):
    """The disk for scratch is mounted as a whole; the folder on it is made in the container."""
    (tmp_path / "storage" / "scratch").mkdir(parents=True)
    software = {
        "kind": "srun",
        "options": [f"--container-image={image(tmp_path)}"],
        "binds": [str(tmp_path / "storage")],
    }
    plan, work = planned(tmp_path, {"scheduler": "slurm"}, software), tmp_path / "work"
    write_launch_files(plan, work)
    for name in ("tokenizer", "tokenize-prose"):
        done = run_step(work / "results" / "small" / "jobs" / name)
        assert done.returncode == 0, (name, (done.stdout + done.stderr)[-3000:])
    assert list((tmp_path / "storage" / "data").rglob("*.bin"))
    shown = run_step(
        work / "results" / "small" / "jobs" / "tokenizer", "env", TMPDIR="/local/job-41"
    ).stdout.splitlines()
    assert {"TMPDIR=/tmp", "HF_HUB_OFFLINE=1", "CUDA_MODULE_LOADING=EAGER", f"PWD={work}"} <= set(shown)


@pytest.mark.parametrize("job", ["tokenizer", "tokenize-prose"])
def test_job_without_its_binds_fails(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, job: str):
    work = tmp_path / "work"
    write_launch_files(plan, work)
    if job == "tokenize-prose":
        assert launch(work / "results" / "small" / "jobs" / "tokenizer").returncode == 0
    monkeypatch.setattr(container, "external_folders", lambda spec: [])
    write_launch_files(plan, work)
    done = launch(work / "results" / "small" / "jobs" / job)
    assert done.returncode == 1 and str(tmp_path) in done.stdout + done.stderr


def test_container_shows_only_bound_folders(tmp_path: Path):
    (tmp_path / "bound").mkdir()
    (tmp_path / "not_bound").mkdir()
    arguments = ["exec", "--bind", str(tmp_path / "bound"), str(fake_image(tmp_path)), "ls", str(tmp_path)]
    done = subprocess.run([str(SUPPORT / "apptainer"), *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["bound"]
