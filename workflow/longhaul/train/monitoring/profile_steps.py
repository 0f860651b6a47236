"""Profiles the steps of profile_steps with torch.profiler on two ranks: a trace for Perfetto, the breakdown for the report.

Rank 0 and the last rank are profiled. A profile changes no number of the training.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from longhaul.artifacts.atomic_files import atomic_path, write_json
from longhaul.artifacts.line_record_fields import StepProfile, TimeBreakdown
from longhaul.artifacts.paths import WeightsFolder
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.monitoring.trace_breakdown import trace_breakdown


class StepProfiler:
    """Records the steps of `profile_steps` in the attempt that trains the first of them."""

    def __init__(self, job: TrainSpec, context: DistributedContext, weights: Path) -> None:
        self._context, self._files = context, WeightsFolder(weights)
        is_profiled = context.rank.rank in (0, context.rank.world_size - 1)
        self._wanted = job.stage.profile_steps if is_profiled else None
        self._profiler: Any = None
        self._unrecorded = self._recorded = 0

    def begin_step(self, step: int) -> None:
        """Start torch.profiler one step before the first that is recorded: its first step in a process is slow."""
        if self._wanted and not self._profiler and step in (self._wanted[0] - 1, self._wanted[0]):
            self._unrecorded = self._wanted[0] - step
            self._profiler = self._start(self._wanted[1] - self._wanted[0] + 1)

    def end_step(self) -> None:
        """Count a step, and write the profile after the last one."""
        if not self._profiler or not self._wanted:
            return
        if self._unrecorded:
            self._unrecorded -= 1
            is_edge = self._unrecorded == 0
        else:
            self._recorded += 1
            is_edge = self._wanted[0] + self._recorded > self._wanted[1]
        if is_edge and self._context.device.type == "cuda":
            # Kernels of the steps before must not be counted, and those of the last step must have run.
            torch.cuda.synchronize(self._context.device)
        self._profiler.step()
        if is_edge and self._recorded:
            self.close()

    def close(self) -> None:
        """Stop an unfinished profile, and write what it has recorded so far."""
        if self._profiler:
            self._profiler.stop()
        self._profiler = self._wanted = None

    def _start(self, steps: int) -> Any:
        profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU]
            + [torch.profiler.ProfilerActivity.CUDA] * (self._context.device.type == "cuda"),
            schedule=torch.profiler.schedule(wait=0, warmup=self._unrecorded, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        profiler.start()
        return profiler

    def _write(self, profiler: Any) -> None:
        """Write trace and breakdown. A profile that cannot be written must not end the training."""
        rank = self._context.rank
        try:
            with tempfile.TemporaryDirectory() as folder:
                plain = Path(folder) / "trace.json"
                profiler.export_chrome_trace(str(plain))
                trace = plain.read_bytes()
            with atomic_path(self._files.profile_trace(rank.rank)) as path:
                path.write_bytes(gzip.compress(trace, compresslevel=3))
            breakdown = trace_breakdown(json.loads(trace)["traceEvents"])
            first = self._wanted[0] if self._wanted else 0
            profile = StepProfile(
                rank=rank.rank,
                host=rank.host,
                first_step=first,
                steps=max(1, self._recorded),
                breakdown=breakdown,
            )
            write_json(self._files.profile(rank.rank), profile)
        except (OSError, ValueError) as error:
            print(f"warning: rank {rank.rank} could not write its profile: {error}", flush=True)
            return
        print(
            f"rank {rank.rank}, profile of {profile['steps']} steps from step {first} on: {_summary(breakdown)}",
            flush=True,
        )


def _summary(breakdown: TimeBreakdown) -> str:
    shares = {**breakdown["covered_s"], "idle": breakdown["idle_s"]}
    return ", ".join(
        f"{name} {100 * seconds / breakdown['seconds']:.1f} %" for name, seconds in shares.items() if seconds
    )
