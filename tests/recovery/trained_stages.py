"""Stages that recovery_worker.py trains: started here, and read afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.parity.prepare_case import run_config
from tests.support.launch_ranks import launch_worker, rank_environment, worker_command

HERE = Path(__file__).resolve().parent
STEPS, HALF = 12, 6
RUN = f"recovery-{os.getpid()}"
"""The name of the run is part of the swap folders' names; other tests may run on this machine at the same time."""


@dataclass
class TrainedStage:
    """One attempt to train a stage in `folder`. A second attempt in the same folder resumes the first.

    stage:       keys of the stage's config
    faults:      what happens to the attempt (recovery_worker.py)
    model:       one of parity_cases.MODELS
    ended:       how the attempt ended; "finished", "killed" or an error message. Set after the training
    checkpoints: names of the folders in checkpoints/. Set after the training
    printed:     what the ranks printed. Set after the training
    """

    folder: Path
    ranks: int
    zero: int = 1
    stage: dict[str, Any] = field(default_factory=dict)
    faults: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    ended: str = ""
    checkpoints: list[str] = field(default_factory=list)
    printed: str = ""

    @property
    def weights(self) -> Path:
        (found,) = self.folder.glob("stages/main/weights/*")
        return found

    def checkpoint(self, step: int) -> Path:
        return self.weights / f"checkpoints/step-{step:08d}"

    def rows(self) -> list[dict[str, Any]]:
        """Return the optimizer steps in metrics.jsonl."""
        return [row for row in _lines(self.weights / "metrics.jsonl") if "loss" in row]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows()]

    def sample_ids(self) -> list[str]:
        return [row["sample_ids"] for row in self.rows()]

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.weights / "events.jsonl"
        return [row for row in _lines(path) if row["event"] == name] if path.exists() else []

    def master_hashes(self) -> dict[str, str]:
        """Return name -> SHA-256 of the last checkpoint's master weights, as DeepSpeed gathers them."""
        tensors = self.weights / f"checkpoints/{self.checkpoints[-1]}/reference/tensors.json"
        return {name: entry["sha256_fp32"] for name, entry in json.loads(tensors.read_text()).items()}

    def as_json(self, shared: Path) -> dict[str, Any]:
        stage = {
            "steps": STEPS,
            "schedule": {"kind": "cosine", "warmup_steps": 2},
            "validation": {"every_steps": HALF, "max_samples": 8},
            "checkpoints": {"every_steps": HALF // 2, "keep_last": 4, "keep_best": 0},
            "gpus_per_node": self.ranks,
            "micro_batch_size": 2,
            "zero": {"stage": self.zero},
            "router_bias_update_rate": 0.0,
            **self.stage,
        }
        run = {**run_config(self.model, "one rank", **stage), "run": RUN}
        return {"folder": str(self.folder), "shared": str(shared), "run": run, **self.faults}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


def train(shared: Path, *stages: TrainedStage, command_prefix: Sequence[str] = ()) -> str:
    """Train stages with equal numbers of ranks one after another in one set of processes; return their output.

    command_prefix: command that runs the ranks' command
    """
    (ranks,) = {stage.ranks for stage in stages}
    path = stages[0].folder.with_suffix(".attempts.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([stage.as_json(shared) for stage in stages]))
    worker = HERE / "recovery_worker.py"
    environment = {"RECOVERY_PORT": str(20_000 + (os.getpid() * 211 + id(path)) % 10_000)}
    if command_prefix:
        environment = {**rank_environment(), "PYTHONPATH": os.pathsep.join(sys.path), **environment}
        command = [*command_prefix, *worker_command(worker, ranks, str(path))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    else:
        done = launch_worker(worker, ranks, str(path), environment=environment, timeout_s=300)
    output = done.stdout + done.stderr
    *parts, _ = re.split(r"^ATTEMPT (.*)\n", done.stdout, flags=re.MULTILINE)
    results = [json.loads(part) for part in parts[1::2]]
    assert done.returncode == 0 and len(results) == len(stages), output[-8000:]
    for stage, result, printed in zip(stages, results, parts[::2], strict=True):
        stage.ended, stage.checkpoints, stage.printed = result["ended"], result["checkpoints"], printed
    return output
