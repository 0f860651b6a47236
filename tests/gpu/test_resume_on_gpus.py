"""A killed training ends with the same bits as an undisturbed one, on one GPU with `deterministic: true`.

Layers are compiled and saves are asynchronous. Sequences are so long that attention's usual kernels give other bits in each run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_speed import plan_stages, write_data
from bench.machine import describe_machine, write_result
from longhaul.artifacts.paths import JobId
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.jobs.launch_files import render_job
from tests.gpu import resume_worker
from tests.gpu.runs_on_gpus import GPUS, describe_gpus

pytestmark = [
    pytest.mark.skipif(not GPUS, reason="needs a GPU"),
    pytest.mark.timeout(900),
]
STEPS, SAVE_EVERY = 12, 3
KILLED_AT = 2 * SAVE_EVERY + 1
FATES = ("undisturbed", "killed")
STAGE: dict[str, Any] = {
    "name": "main",
    "kind": "pretrain",
    "dataset": "corpus",
    "steps": STEPS,
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "sequence_length": 2048,
    "precision": "bf16",
    "optimizer": {"lr": 1e-3},
    "schedule": {"kind": "cosine", "warmup_steps": 2},
    "zero": {"stage": 1},
    "deterministic": True,
    "validation": {"every_steps": STEPS},
    "checkpoints": {"every_steps": SAVE_EVERY, "keep_last": 4, "keep_best": 0},
    "export": "last",
}
SIZES = {
    "vocab_size": 16_384,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"llama": {**SIZES, "intermediate_size": 1536, "num_key_value_heads": 4, "head_dim": 64}},
    "mixture": {
        "deepseek_v3": {
            **SIZES,
            "num_key_value_heads": 8,
            "intermediate_size": 1024,
            "moe_intermediate_size": 256,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 256,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        }
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of <model>-undisturbed and <model>-killed. The latter were killed once, and resumed."""
    folder = tmp_path_factory.mktemp("resume")
    write_data(folder)
    jobs = {name: _job(folder, name) for name in (f"{model}-{fate}" for model in MODELS for fate in FATES)}
    with ThreadPoolExecutor() as pool:
        kills = {name: (KILLED_AT,) if name.endswith("killed") else () for name in jobs}
        first = {name: pool.submit(_train, job, *kills[name]) for name, job in jobs.items()}
        assert [future.result() for future in first.values()] == [0, -9, 0, -9]
        again = [pool.submit(_train, job) for name, job in jobs.items() if kills[name]]
        assert [future.result() for future in again] == [0, 0]
    return folder


@pytest.fixture(scope="module")
def record() -> Iterator[list[str]]:
    """Collect lines for bench/results/gpu_resume.txt."""
    lines = [describe_gpus()]
    yield lines
    versions = describe_machine(("torch", "triton", "deepspeed", "transformers"))[1:]
    write_result("gpu_resume", ["command: make test-gpu", *versions, *lines])


@pytest.mark.parametrize("model", MODELS)
def test_a_killed_training_ends_with_the_bits_of_an_undisturbed_one(folders: Path, model: str, record: list[str]):
    undisturbed, killed = (_weights(folders / f"{model}-{fate}") for fate in FATES)
    resumed = [row["step"] for row in _rows(killed / "events.jsonl") if row["event"] == "resumed"]
    assert resumed == [SAVE_EVERY], "the save in flight was not complete, the one before was"
    losses = [_losses(folder) for folder in (undisturbed, killed)]
    expected, found = _hashes(undisturbed), _hashes(killed)
    equal = sum(found[name] == expected[name] for name in expected)
    equal_losses = sum(a == b for a, b in zip(*losses, strict=True))
    record.append(
        f"{model}: killed after step {KILLED_AT} during a save, resumed from step {resumed[0]}; equal to the last bit: "
        f"{equal} of {len(expected)} master weights, {equal_losses} of {STEPS} losses; last loss {losses[0][-1]:.6f}"
    )
    assert len(losses[0]) == equal_losses == STEPS
    assert found == expected and len(expected) > 10
    assert "run without torch.compile" not in (folders / f"{model}-undisturbed/log.txt").read_text()


def _job(folder: Path, name: str) -> Path:
    """Write the spec of a training job in a folder of its own; return its path."""
    plan = plan_stages(folder, MODELS[name.partition("-")[0]], [STAGE])
    own, job_id = folder / name, JobId("train", ("main",))
    render_job(plan, job_id, own).write(own)
    job = job_spec(plan, job_id)
    assert isinstance(job, TrainSpec)
    paths = {
        "tokenizer": folder / "tokenizer.json",
        "data": folder / "corpus/data.json",
        "deepspeed": own / "ds_config.json",
        "folder": own,
        "weights_root": own / "weights",
        "out": own / "checkpoint.json",
    }
    job.model_copy(update={key: str(path) for key, path in paths.items()}).write(own / "job.json")
    return own / "job.json"


def _train(job: Path, kill_at_step: int | None = None) -> int:
    """Train in a process of its own; return its exit code. Its output goes to log.txt beside the job."""
    arguments = [str(job), *([] if kill_at_step is None else [str(kill_at_step)])]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}
    port = 21_000 + (os.getpid() * 31) % 9_000 + sorted(job.parents[1].iterdir()).index(job.parent)
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    environment = {**os.environ, **rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": paths}
    with (job.parent / "log.txt").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-m", resume_worker.__name__, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
            timeout=300,
        )
    if done.returncode not in (0, -9):
        print((job.parent / "log.txt").read_text()[-4000:])
    return done.returncode


def _weights(folder: Path) -> Path:
    (found,) = (folder / "weights").iterdir()
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


def _losses(weights: Path) -> list[float]:
    return [row["loss"] for row in _rows(weights / "metrics.jsonl") if "loss" in row]


def _hashes(weights: Path) -> dict[str, str]:
    """Return name -> SHA-256 of the last checkpoint's master weights."""
    tensors = weights / f"checkpoints/step-{STEPS:08d}/reference/tensors.json"
    return {name: entry["sha256_fp32"] for name, entry in json.loads(tensors.read_text()).items()}
