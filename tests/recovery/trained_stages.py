"""Stages that are trained by survival_worker.py: started, and read afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.parity.run_parity_case import config
from tests.support.ranks import command_of, environment_of_ranks, launch

HERE = Path(__file__).resolve().parent
STEPS, HALF = 12, 6
RUN = f"cell-{os.getpid()}"
"""Whose folders on the node's disk these are, should other tests be at work beside."""


@dataclass
class Leg:
    """A stage in `folder`, its layout, and what befalls it; `ended` and `checkpoints` are filled in when it has run."""

    folder: Path
    ranks: int
    zero: int = 1
    stage: dict[str, Any] = field(default_factory=dict)
    befalls: dict[str, Any] = field(default_factory=dict)
    twin: str = "llama"
    ended: str = ""
    checkpoints: list[str] = field(default_factory=list)

    @property
    def weights(self) -> Path:
        (found,) = self.folder.glob("stages/main/weights/*")
        return found

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl, optimizer steps alone."""
        return [row for row in _lines(self.weights / "metrics.jsonl") if "loss" in row]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows()]

    def sample_ids(self) -> list[str]:
        return [row["sample_ids"] for row in self.rows()]

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.weights / "events.jsonl"
        return [row for row in _lines(path) if row["event"] == name] if path.exists() else []

    def masters(self) -> dict[str, str]:
        """Name -> SHA-256 of the last step's master weights, as DeepSpeed gathers them."""
        proof = self.weights / f"checkpoints/{self.checkpoints[-1]}/proof/tensors.json"
        return {name: entry["sha256_fp32"] for name, entry in json.loads(proof.read_text()).items()}

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
        run = {**config(self.twin, "one", **stage), "run": RUN}
        return {"folder": str(self.folder), "shared": str(shared), "run": run, **self.befalls}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


def train(shared: Path, *legs: Leg, before: list[str] = []) -> str:  # noqa: B006
    """Runs legs of one number of ranks in one set of processes; `before` is put in front of the command."""
    (ranks,) = {leg.ranks for leg in legs}
    path = legs[0].folder.with_suffix(".legs.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([leg.as_json(shared) for leg in legs]))
    worker = HERE / "recovery_worker.py"
    environment = {"RECOVERY_PORT": str(20_000 + (os.getpid() * 211 + id(path)) % 10_000)}
    if before:
        environment = {**environment_of_ranks(), "PYTHONPATH": os.pathsep.join(sys.path), **environment}
        command = [*before, *command_of(worker, ranks, str(path))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    else:
        done = launch(worker, ranks, str(path), environment=environment, timeout_s=300)
    output = done.stdout + done.stderr
    ends = [json.loads(line.removeprefix("LEG ")) for line in done.stdout.splitlines() if line.startswith("LEG ")]
    assert done.returncode == 0 and len(ends) == len(legs), output[-8000:]
    for leg, end in zip(legs, ends, strict=True):
        leg.ended, leg.checkpoints = end["ended"], end["checkpoints"]
    return output
