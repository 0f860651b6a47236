"""A run of the whole pipeline that takes seconds, started like a user's: snakemake in a subprocess, in its own folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.support.run_module_in_forks import ForkedModule

REPOSITORY = Path(__file__).resolve().parents[2]
SNAKEMAKE = [sys.executable, "-m", "snakemake"]
SECRETS = {
    name: f"canary-{name.lower().replace('_', '-')}-{'5d0e1c7ab0f5' * 3}"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")
}
"""Every test run has these in its environment, and must not write them anywhere. W&B accepts keys of 40 characters."""


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Return a config of two short stages of a model of 0.2 M parameters on two processes. `changes` replace top-level keys."""
    stage = {
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "sequence_length": 64,
        "gpus_per_node": 2,
        "precision": "fp32",
        "optimizer": {"lr": 0.003},
        "checkpoints": {"every_steps": 10, "keep_best": 1},
        "validation": {"every_steps": 10, "max_samples": 8, "before_first_step": True},
        "export_dtype": "fp32",
        "minutes": 5,
    }
    return {
        "run": "tiny",
        "site": "./site.yaml",
        "seed": 3,
        "tokenizer": {"train": {"vocab_size": 400, "datasets": ["prose"]}},
        "datasets": {
            "prose": {"kind": "text", "files": ["prose.jsonl"], "validation_fraction": 0.1},
            "chats": {"kind": "chat", "files": ["chats.jsonl"], "validation_fraction": 0.1},
        },
        "model": {
            "llama": {
                "vocab_size": 400,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "tie_word_embeddings": True,
            }
        },
        "checks": {"nodes": 1, "min_disk_free_gb": 0.1},
        "trackers": {"tensorboard": False},
        "stages": [
            {
                "name": "base",
                "kind": "pretrain",
                "dataset": "prose",
                "steps": 40,
                "export": "last",
                "zero": {"stage": 1},
                **deepcopy(stage),
            },
            {
                "name": "chat",
                "kind": "sft",
                "dataset": "chats",
                "from": {"stage": "base", "checkpoint": "best"},
                "epochs": 0.4,
                "zero": {"stage": 3},
                "export": "last",
                **stage,
            },
        ],
        **changes,
    }


def local_site() -> dict[str, Any]:
    """Return a site like this machine, with four cores."""
    partition = {"jobs": ["gpu"], "node": {"cpus": 4, "memory_mb": 3000}}
    return {"name": "here", "scheduler": "local", "partitions": [partition]}


def write_site(folder: Path, site: dict[str, Any]) -> None:
    (folder / "site.yaml").write_text(yaml.safe_dump(site))


def write_data(folder: Path) -> None:
    """Write a few documents and conversations, always the same."""
    words = "the long haul takes raw text to a model and proves every step of the way home again".split()  # noqa: SIM905
    prose = [f"Part {i}: " + " ".join(words[(i * k) % len(words)] for k in range(1, 60)) for i in range(1, 61)]
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in prose))
    chats = [
        [
            {"role": "user", "content": f"What follows {i}?"},
            {"role": "assistant", "content": f"After {i} comes {i + 1}."},
        ]
        for i in range(80)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


class PipelineRun:
    """A run in a working folder with a config and data."""

    def __init__(self, folder: Path, config: dict[str, Any], profile: str = "local") -> None:
        self.folder, self.config, self.profile = folder, config, profile
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder)
        write_site(folder, local_site())
        self.save()

    @property
    def results(self) -> Path:
        return self.folder / "results" / self.config["run"]

    def save(self, text: str | None = None) -> None:
        """Write run.yaml: the current config, or `text`."""
        (self.folder / "run.yaml").write_text(text or yaml.safe_dump(self.config, sort_keys=False))

    def command(self, *arguments: str) -> list[str]:
        profile = str(REPOSITORY / "profiles" / self.profile)
        where = [
            "-s",
            str(REPOSITORY / "Snakefile"),
            "--directory",
            str(self.folder),
            "--configfile",
            str(self.folder / "run.yaml"),
        ]
        return [*SNAKEMAKE, *where, "--profile", profile, *arguments]

    def snakemake(self, *arguments: str, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: PLW1510
            self.command(*arguments),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.environment(),
        )

    def environment(self) -> dict[str, str]:
        return {**os.environ, **SECRETS, "PYTHONWARNINGS": "ignore"}

    def run(self, *arguments: str, timeout_s: float = 400) -> str:
        """Run Snakemake to its end and return its output; if it fails, fail with the output and the job logs."""
        done = self.snakemake(*arguments, timeout_s=timeout_s)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output[-6000:] + self.logs()
        return output

    def would_run(self) -> dict[str, int]:
        """Return rule -> number of jobs of a dry run, without `all`."""
        return {rule: count for rule, count in job_counts(self.dry_run()).items() if rule != "all"}

    def dry_run(self, *targets: str) -> str:
        """Return the output of a dry run. It fails like `run`, and is quicker, because Snakemake is imported already."""
        words = self.command("-n", *targets)[len(SNAKEMAKE) :]
        done = _snakemake().run(*words, cwd=self.folder, environment=self.environment())
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
        return done.stdout + done.stderr

    def logs(self) -> str:
        return "\n".join(
            f"--- {path}\n{path.read_text()[-6000:]}" for path in sorted(self.results.glob("logs/**/*.log"))
        )

    def weights(self, stage: str) -> Path:
        """Return the weights folder of a finished stage."""
        return self.folder / self.read(f"stages/{stage}/checkpoint.json")["weights"]

    def read(self, name: str) -> Any:
        return json.loads((self.results / name).read_text())


@cache
def _snakemake() -> ForkedModule:
    return ForkedModule("snakemake", ("snakemake.cli", "longhaul.scheduling.snakefile_functions"), os.environ)


def leaks(folder: Path) -> list[str]:
    """Return "<file>: <name>" for each of SECRETS in a file below `folder`, in plain text or as part of base64."""
    patterns = {name: _forms(value.encode()) for name, value in SECRETS.items()}
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [f"{path}: {name}" for name, forms in patterns.items() if any(form in content for form in forms)]
    return found


def _forms(secret: bytes) -> list[bytes]:
    """Return the secret, and the part of its base64 that depends on it alone if 0, 1 or 2 (modulo 3) bytes precede it."""
    return [secret, *(b64encode(b"-" * before + secret)[before + (before > 0) : -4] for before in range(3))]


def job_counts(output: str) -> dict[str, int]:
    """Return the last `Job stats` table of Snakemake's output; empty if there is nothing to do."""
    tables = re.findall(r"^job +count\n-+ +-+\n((?:\w+ +\d+\n)+)", output, flags=re.MULTILINE)
    rows = tables[-1].splitlines() if tables else []
    return {rule: int(count) for rule, count in (row.split() for row in rows) if rule != "total"}
