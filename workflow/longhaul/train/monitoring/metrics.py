"""Numbers of a training: metrics.jsonl, trackers, a progress line, and a record of every leg."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch

from longhaul.artifacts.files import write_text
from longhaul.config.model_size import geometry
from longhaul.jobs.specs import TrainSpec
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.monitoring.events import Events
from longhaul.train.monitoring.trackers import Tracker, open_trackers

_PROGRESS_EVERY_S = 5.0


class Metrics:
    """Writes on rank 0 only; lines past the step a resume starts from are dropped, as those steps are done again."""

    def __init__(
        self,
        job: TrainSpec,
        folder: Path,
        resumed_from: int,
        processes: DistributedContext,
        model: dict[str, Any],
        events: Events,
    ) -> None:
        self._job, self._processes, self._events = job, processes, events
        self._flops_per_token = geometry(model).flops_per_token(job.stage.sequence_length)
        self._started, self._first_step, self._printed = time.monotonic(), resumed_from, 0.0
        hosts = processes.gather(processes.rank.host)
        if not processes.is_main:
            self._trackers: list[Tracker] = []
            return
        self._path = folder / "metrics.jsonl"
        # Who starts at step 0 validates before the first step, and does so again.
        first_step = resumed_from + 1 if resumed_from else 0
        self._stream = self._open_before(first_step)
        self._trackers = open_trackers(job, folder, first_step)
        with (folder / "attempts.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(_leg(job, resumed_from, processes, hosts)) + "\n")

    def _open_before(self, step: int) -> TextIO:
        """metrics.jsonl without `step` and those after it, which are done again; what they had taken is an event."""
        lost = _drop_lines_from(self._path, step)
        if lost:
            seconds = sum(row.get("step_time_s", 0.0) + row.get("data_wait_s", 0.0) for row in lost)
            self._events.write("work_lost", to_step=max(0, step - 1), steps=len(lost), seconds=round(seconds, 3))
        return self._path.open("a", encoding="utf-8")

    def roll_back(self, step: int) -> None:
        """The steps past `step` are done again."""
        if self._processes.is_main:
            self._stream.close()
            self._stream = self._open_before(step + 1)
            for tracker in self._trackers:
                tracker.rewind(step + 1)

    def step(self, step: int, seconds: float, values: dict[str, Any]) -> None:
        """One optimizer step: its values, and what follows from its duration."""
        if not self._processes.is_main:
            return
        tokens_per_s = self._job.stage.global_batch_size * self._job.stage.sequence_length / seconds
        row = {
            "step": step,
            **values,
            "step_time_s": round(seconds, 6),
            "tokens_per_s": round(tokens_per_s, 1),
            "mfu": self._mfu(tokens_per_s),
            **device_numbers(self._processes.device),
        }
        self._write(row)
        self._progress(step, row)

    def validation(self, step: int, loss: float) -> None:
        """The held-out loss after `step` steps."""
        if self._processes.is_main:
            self._write({"step": step, "validation_loss": loss})
            print(f"step {step}/{self._job.steps}  validation loss {loss:.4f}", flush=True)

    def note(self, text: str, **_: Any) -> None:
        if self._processes.is_main:
            print(text, flush=True)

    def close(self) -> None:
        if self._processes.is_main:
            self._stream.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, row: dict[str, Any]) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._stream.write(json.dumps(clean) + "\n")
        self._stream.flush()
        numbers = {
            k: v for k, v in clean.items() if isinstance(v, (int, float)) and not isinstance(v, bool) and k != "step"
        }
        for tracker in self._trackers:
            tracker.log(row["step"], numbers)

    def _mfu(self, tokens_per_s: float) -> float | None:
        peak = self._job.gpu_peak_tflops
        return round(tokens_per_s * self._flops_per_token / (peak * 1e12 * self._job.world_size), 4) if peak else None

    def _progress(self, step: int, row: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._printed < _PROGRESS_EVERY_S and step != self._job.steps:
            return
        self._printed = now
        left_s = (now - self._started) / max(1, step - self._first_step) * (self._job.steps - step)
        print(
            f"step {step}/{self._job.steps}  loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
            f"{row['tokens_per_s']:,.0f} tokens/s  {left_s / 60:.1f} min left",
            flush=True,
        )


def device_numbers(device: torch.device) -> dict[str, Any]:
    """Peak memory in bytes (of the GPU, or of this process) and GPU utilisation in per cent; None where there is no GPU."""
    if device.type != "cuda":
        return {"memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "gpu_utilisation": None}
    return {"memory_bytes": torch.cuda.max_memory_allocated(device), "gpu_utilisation": _utilisation(device)}


def _utilisation(device: torch.device) -> int | None:
    """What NVML says. It does not say it of a part of a GPU, or to everyone: no reason to end a training."""
    try:
        return torch.cuda.utilization(device)
    except Exception:  # NVML's own errors have no other class in common
        return None


def _leg(job: TrainSpec, resumed_from: int, processes: DistributedContext, hosts: list[str]) -> dict[str, Any]:
    """What may differ from leg to leg without changing the result."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from": resumed_from,
        "world_size": job.world_size,
        "nodes": job.stage.nodes,
        "hosts": list(dict.fromkeys(hosts)),
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "zero": job.stage.zero.model_dump(mode="json"),
        "micro_batch_size": job.stage.micro_batch_size,
        "accumulation": job.accumulation,
        "activation_checkpointing": job.stage.activation_checkpointing,
        "device": processes.device.type,
        "threads": processes.threads,
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")}
        | {"python": sys.version.split()[0]},
    }


def _drop_lines_from(path: Path, step: int) -> list[dict[str, Any]]:
    """Returns the rows of optimizer steps that it drops. A killed run may also have written half a line."""
    if not path.exists():
        return []
    kept, lost = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] < step:
            kept.append(line)
        elif "loss" in row:
            lost.append(row)
    write_text(path, "".join(line + "\n" for line in kept))
    return lost
