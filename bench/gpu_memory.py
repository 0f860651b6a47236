"""Compares planned with measured peak memory of one GPU, and losses with those of the baseline, for all memory options.

    make bench-memory                    a dense model and a mixture of experts of about 1 B parameters
    make bench-memory PYTHON=python3     with an installed torch
    make bench-memory ROWS=mixture       one group of rows

Each option trains the same steps from the same weights on the same samples, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.machine import MODULE_PATH, describe_machine, write_result
from longhaul.artifacts.paths import JobId
from longhaul.config.load_config import load_config
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.jobs.launch_files import render_job
from longhaul.planning import Plan, build_plan
from tests.support.corpora import conversation, dataset, make_shards, make_tokenizer, text, write_jsonl

CHATML = Path(__file__).resolve().parents[1] / "templates" / "chat" / "chatml.jinja"
STEPS, SEQUENCE_LENGTH, MICRO_BATCH, GLOBAL_BATCH = 6, 2048, 4, 8
PROCESSES = 2
"""Processes that share the GPU. Each has its own peak, and building a model takes longer than its steps."""
MODELS: dict[str, dict[str, Any]] = {
    "dense": {
        "llama": {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
        }
    },
    "mixture": {
        "qwen3_moe": {
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "moe_intermediate_size": 768,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "max_position_embeddings": 4096,
        }
    },
}
# In fp32 a micro batch of four would leave too little memory for the second process.
FP32 = {"precision": "fp32", "micro_batch_size": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "zero1": {"zero": {"stage": 1}},
    "zero2": {"zero": {"stage": 2}},
    "zero3": {"zero": {"stage": 3}},
    "zero2-optimizer-offloaded": {"zero": {"stage": 2, "offload_optimizer": "cpu"}},
    "zero3-all-offloaded": {"zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}},
    "zero3-optimizer-on-a-disk": {"zero": {"stage": 3, "offload_optimizer": "nvme"}},
    "zero3-all-on-a-disk": {"zero": {"stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme"}},
    "selective": {"zero": {"stage": 1}, "activation_checkpointing": "selective"},
    "full": {"zero": {"stage": 1}, "activation_checkpointing": "full"},
    "offload": {"zero": {"stage": 1}, "activation_checkpointing": "offload"},
    # With few activations, the optimizer step can be the peak: updated in one pass over memory, or by DeepSpeed's own step.
    "zero3-full": {"zero": {"stage": 3}, "activation_checkpointing": "full"},
    "full-spike-factor": {
        "zero": {"stage": 1},
        "activation_checkpointing": "full",
        "bad_steps": {"spike_factor": 10.0},
    },
    "fp32-zero1": {"zero": {"stage": 1}, **FP32},
    "fp32-zero0": {"zero": {"stage": 0}, **FP32},  # bf16 at ZeRO 0 is refused
    "packs": {"zero": {"stage": 1}, "kind": "sft", "dataset": "chat"},
}
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": (
        "dense",
        (
            "zero1",
            "zero2",
            "zero3",
            "selective",
            "full",
            "offload",
            "zero3-full",
            "full-spike-factor",
            "fp32-zero1",
            "fp32-zero0",
            "packs",
        ),
    ),
    "mixture": ("mixture", ("zero1", "zero3", "selective", "full", "fp32-zero1", "packs")),
    "offloaded": (
        "dense",
        (
            "zero1",
            "zero2-optimizer-offloaded",
            "zero3-all-offloaded",
            "zero3-optimizer-on-a-disk",
            "zero3-all-on-a-disk",
        ),
    ),
}
"""Group -> (model, options). Each has a record of its own, so that a part can run alone."""
BASELINE = {name: "zero1" for name in OPTIONS} | {
    "fp32-zero1": "fp32-zero1",
    "fp32-zero0": "fp32-zero1",
    "packs": "packs",
}
"""Option -> the option whose losses it must reproduce: the same data in the same precision."""


def main() -> None:
    """Train every option of the named groups, or of all, and print one line for each."""
    groups = sys.argv[1:] or list(GROUPS)
    if unknown := set(groups) - set(GROUPS):
        raise SystemExit(f"no group of rows {', '.join(sorted(unknown))}; the groups are {', '.join(GROUPS)}")
    device = torch.cuda.get_device_name(0)
    first = f"{device}; {STEPS} steps, sequence length {SEQUENCE_LENGTH}, micro batch {MICRO_BATCH}, bf16"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        for group in groups:
            lines = [first, *compare(group, folder)]
            write_result(record(group), [*describe_machine(("torch", "deepspeed", "transformers")), *lines])


def record(group: str) -> str:
    """Return the name of a group's record in bench/results."""
    return "gpu_memory" if group == "dense" else f"gpu_memory_{group}"


def write_data(folder: Path) -> None:
    """Write a tokenizer, and the shards of each dataset in a folder of its own."""
    corpus = write_jsonl(folder / "corpus.jsonl", "text", [text(number, 200) for number in range(400)])
    chats = write_jsonl(folder / "chats.jsonl", "messages", [conversation(number, 4) for number in range(1000)])
    make_tokenizer(folder, [corpus], chat_template=str(CHATML))
    make_shards(folder / "corpus", folder, [corpus], dataset("text", validation_fraction=0.1))
    make_shards(folder / "chat", folder, [chats], dataset("chat", validation_fraction=0.1))


def plan_options(folder: Path, model: str) -> Plan:
    """Return a plan with one stage for each option, on one GPU."""
    stage = {
        "kind": "pretrain",
        "dataset": "corpus",
        "steps": STEPS,
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": MICRO_BATCH,
        "sequence_length": SEQUENCE_LENGTH,
        "precision": "bf16",
        "optimizer": {"lr": 1e-4},
        "schedule": {"kind": "constant", "warmup_steps": 2},
    }
    node = {"cpus": os.cpu_count(), "memory_mb": 64_000, "gpus": 1}
    site = {
        "name": "here",
        "scheduler": "local",
        "partitions": [{"jobs": ["gpu"], "node": node}],
        "accelerator": {"cuda": torch.version.cuda or "13.0"},
    }
    config = {
        "run": "memory",
        "site": "./site.yaml",
        "tokenizer": {"train": {"vocab_size": 400, "datasets": ["corpus"]}},
        "datasets": {
            "corpus": {"kind": "text", "files": ["corpus.jsonl"]},
            "chat": {"kind": "chat", "files": ["chats.jsonl"]},
        },
        "model": MODELS[model],
        "trackers": {"tensorboard": False},
        "storage": {"scratch": str(folder)},
        "stages": [{"name": name, **stage, **option} for name, option in OPTIONS.items()],
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return build_plan(load_config(folder / "run.yaml"))


def compare(group: str, folder: Path) -> list[str]:
    """Return lines with planned and measured GiB of tensors, GiB that the allocator holds, and the largest loss difference."""
    model, options = GROUPS[group]
    planned = plan_options(folder, model)
    with ThreadPoolExecutor(PROCESSES) as pool:
        trained = pool.map(lambda name: train_option(planned, name, folder / group), options)
        found = dict(zip(options, trained, strict=True))
    columns = f"{'planned GiB':>11} {'measured':>9} {'held':>6} {'planned / measured':>19} {'loss differs by':>16}"
    lines = ["", f"{group:28} {columns}"]
    for name, option in found.items():
        total = planned.stage(name).memory.total / 2**30  # pyright: ignore[reportOptionalMemberAccess]
        peak, held = option["peak_bytes"] / 2**30, option["held_bytes"] / 2**30
        differs = max(
            abs(a - b) / abs(b) for a, b in zip(option["losses"], found[BASELINE[name]]["losses"], strict=True)
        )
        lines.append(f"{name:28} {total:11.2f} {peak:9.2f} {held:6.2f} {total / peak:19.3f} {differs:16.1e}")
    parts = {name: planned.stage(name).memory for name in options}
    return lines + [f"{name:28} {memory.as_gib()}" for name, memory in parts.items() if memory]


def train_option(planned: Plan, name: str, folder: Path) -> dict[str, Any]:
    """Train the stage of an option; return what gpu_memory_worker.py prints."""
    own = folder / name
    render_job(planned, JobId("train", (name,)), own).write(own)
    job = job_spec(planned, JobId("train", (name,)))
    assert isinstance(job, TrainSpec)
    shared = folder.parent
    data = shared / job.stage.dataset / "data.json"
    paths = {"tokenizer": shared / "tokenizer.json", "data": data, "deepspeed": own / "ds_config.json"}
    job.model_copy(update={key: str(path) for key, path in paths.items()}).write(own / "job.json")
    port = 21_000 + (os.getpid() * 31 + list(OPTIONS).index(name)) % 9_000
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}
    launch = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "8"}  # as in launch.sh
    environment = {**os.environ, **MODULE_PATH, **rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **launch}
    command = [sys.executable, "-m", "bench.gpu_memory_worker", str(own)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=1200)
    if done.returncode:
        raise SystemExit(f"{name} failed\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{folder.name} {name}: {found}", flush=True)
    return found


if __name__ == "__main__":
    main()
