"""Computes tokens/s, MFU, GPU memory and utilisation; writes metrics.jsonl, attempts.jsonl and the progress line."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from longhaul.artifacts.atomic_files import write_text
from longhaul.artifacts.line_record_fields import MetricsRow
from longhaul.artifacts.line_records import append_record, open_for_append, read_lines
from longhaul.artifacts.pack_totals import padding_share
from longhaul.artifacts.paths import WeightsFolder
from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.model_size import model_size
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.monitoring.events import EventWriter
from longhaul.train.monitoring.trackers import Tracker, open_trackers

_PROGRESS_EVERY_S = 5.0


class Metrics:
    """Writes on rank 0 only. Lines past the step from which a resume starts are dropped, as their steps are repeated."""

    def __init__(
        self,
        job: TrainSpec,
        folder: Path,
        resumed_from: int,
        context: DistributedContext,
        model: HuggingFaceConfig,
        events: EventWriter,
        epochs: dict[str, float],
        cut_loss_share: float | None = None,
    ) -> None:
        """Open metrics.jsonl.

        epochs:         by dataset, in the whole stage
        cut_loss_share: share of the loss tokens that no pack holds; None where nothing is packed
        """
        self._cuts = {} if cut_loss_share is None else {"cut_loss_share": round(cut_loss_share, 6)}
        self._job, self._context, self._events = job, context, events
        self._sizes = model_size(model)
        self._started, self._first_step, self._printed = time.monotonic(), resumed_from, 0.0
        self._trackers: list[Tracker] = []
        hosts = context.gather(context.rank.host)
        if not context.is_main:
            return
        self._path = WeightsFolder(folder).metrics
        # A start at step 0 may validate before the first step, also after an attempt that saved nothing.
        first_step = resumed_from + 1 if resumed_from else 0
        self._stream = self._open_before(first_step)
        self._trackers = open_trackers(job, folder, first_step)
        attempt = _attempt(job, resumed_from, context, hosts) | {"epochs": epochs}
        append_record(WeightsFolder(folder).attempts, attempt)
        named = ", ".join(f"{count:.2f} epochs of {dataset}" for dataset, count in epochs.items())
        print(f"{job.steps:,} steps of {job.stage.global_batch_size:,} samples: {named}", flush=True)

    def _open_before(self, step: int) -> IO[str]:
        """Open metrics.jsonl without the lines of `step` and later, which are repeated; their duration becomes an event."""
        lost = _drop_lines_from(self._path, step)
        if lost:
            seconds = sum((row.get("step_time_s") or 0.0) + (row.get("data_wait_s") or 0.0) for row in lost)
            written_s = [row["time_s"] for row in lost if "time_s" in row]  # older releases wrote no time
            last = {"last_step_s": max(written_s)} if written_s else {}
            self._events.write(
                "work_lost", to_step=max(0, step - 1), steps=len(lost), seconds=round(seconds, 3), **last
            )
        return open_for_append(self._path)

    def roll_back(self, step: int) -> None:
        """Drop the lines of the steps after `step`, which are repeated."""
        if self._context.is_main:
            self._stream.close()
            self._stream = self._open_before(step + 1)
            for tracker in self._trackers:
                tracker.rewind(step + 1)

    def step(self, step: int, seconds: float, values: Mapping[str, Any]) -> None:
        """Write one optimizer step: its values, and what follows from them and its duration.

        Tokens per second are tokens without padding, and the wait for data is part of the time.
        """
        if not self._context.is_main:
            return
        whole_s = seconds + values["data_wait_s"]
        tokens_per_s = values["tokens"] / whole_s
        positions = self._job.stage.global_batch_size * self._job.stage.sequence_length
        row = {
            "step": step,
            **values,
            "padding_share": round(padding_share(values["tokens"], positions), 6),
            **self._cuts,
            "step_time_s": round(seconds, 6),
            "tokens_per_s": round(tokens_per_s, 1),
            "mfu": self._mfu(values["tokens"], values["attention_pairs"], whole_s),
            **device_numbers(self._context.device),
        }
        self._write(row)
        self._print_progress(step, row)

    def validation(self, step: int, loss: float) -> None:
        """Write the validation loss after `step` steps."""
        if self._context.is_main:
            self._write({"step": step, "validation_loss": loss})
            print(f"step {step}/{self._job.steps}  validation loss {loss:.4f}", flush=True)

    def print(self, text: str) -> None:
        """Print a line on rank 0."""
        if self._context.is_main:
            print(text, flush=True)

    def close(self) -> None:
        if self._context.is_main:
            self._stream.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, row: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._stream.write(json.dumps({**finite, "time_s": round(time.time(), 3)}) + "\n")
        self._stream.flush()
        numbers: dict[str, float] = {
            k: v for k, v in finite.items() if isinstance(v, (int, float)) and not isinstance(v, bool) and k != "step"
        }
        for tracker in self._trackers:
            tracker.log(row["step"], numbers)

    def _mfu(self, tokens: int, attention_pairs: int, seconds: float) -> float | None:
        """Return the model FLOPs utilisation; None where the site file has no peak of its GPUs."""
        if self._job.gpu_peak_tflops is None:
            return None
        possible_flops = self._job.gpu_peak_tflops * 1e12 * self._job.world_size * seconds
        return round(self._sizes.training_flops(tokens, attention_pairs) / possible_flops, 4)

    def _print_progress(self, step: int, row: dict[str, Any]) -> None:
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


def device_numbers(device: torch.device) -> dict[str, int | None]:
    """Return peak memory in bytes (of the GPU, or of this process) and GPU utilisation in per cent; None without a GPU."""
    if device.type != "cuda":
        return {"memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "gpu_utilisation": None}
    return {"memory_bytes": torch.cuda.max_memory_allocated(device), "gpu_utilisation": _utilisation(device)}


def _utilisation(device: torch.device) -> int | None:
    """Return NVML's number; None where NVML has none, as for a MIG slice or without permission. Training continues."""
    try:
        return torch.cuda.utilization(device)
    except Exception:  # NVML's errors have no other class in common
        return None


def _attempt(job: TrainSpec, resumed_from: int, context: DistributedContext, hosts: list[str]) -> dict[str, object]:
    """Return what may differ between attempts without a change of the result."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from": resumed_from,
        "world_size": job.world_size,
        "nodes": job.stage.nodes,
        "hosts": list(dict.fromkeys(hosts)),
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "zero": job.stage.zero.model_dump(mode="json"),
        "parallel": job.stage.parallel.model_dump(),
        "micro_batch_size": job.stage.micro_batch_size,
        "accumulation": job.accumulation,
        "activation_checkpointing": job.stage.activation_checkpointing,
        "device": context.device.type,
        "threads": context.threads,
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")}
        | {"python": sys.version.split()[0]},
    }


def _drop_lines_from(path: Path, step: int) -> list[MetricsRow]:
    """Drop the lines of `step` and later, and return the optimizer steps among them.

    A line that is no valid record is dropped, too.
    """
    kept, lost = [], []
    for line in read_lines(path, MetricsRow):
        row = line.record
        if row is None:
            continue
        if row["step"] < step:
            kept.append(line.text)
        elif "loss" in row:
            lost.append(row)
    if path.exists():
        write_text(path, "".join(text.decode() + "\n" for text in kept))
    return lost
