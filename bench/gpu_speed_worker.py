"""Runs one row of bench/gpu_speed.py: python gpu_speed_worker.py FOLDER ROW, where FOLDER contains job.json.

It prints "RESULT " and a JSON object. A line on stdin says that the GPU is free.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from bench import gpu_speed_peers, kernel_times
from bench.gpu_speed_rows import LOSS_STEPS, ROWS, Row
from bench.trainer_without_supervisor import build_trainer
from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.distributed_context import DistributedContext, distributed_context

WARM_UP_STEPS, BLOCKS, BLOCK_STEPS = 4, 3, 5
Step = Callable[[], Any]


def main() -> None:
    """Run the row."""
    folder, row = Path(sys.argv[1]), next(row for row in ROWS if row.name == sys.argv[2])
    job = TrainSpec.read(folder / "job.json")
    _use_kernels(row.kernels)
    if row.kind == "limit":
        _wait_for_gpu()
        result = {"tokens_per_s": gpu_speed_peers.limit(job)}
    else:
        result = _measure(row, job, folder)
    print("\nRESULT " + json.dumps(result), flush=True)  # a progress bar may have left its line open


def _use_kernels(kernels: str) -> None:
    if kernels == "flash":
        torch.backends.cuda.enable_cudnn_sdp(False)
    if kernels == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

        # The trainer computes the loss itself.
        apply_liger_kernel_to_llama(fused_linear_cross_entropy=False)


def _measure(row: Row, job: TrainSpec, folder: Path) -> dict[str, Any]:
    waited_s = _wait_for_gpu()
    with distributed_context(job) as context:
        if row.kind == "longhaul":
            step, finish = _longhaul(job, context, folder)
        else:
            tokenizer = TokenizerManifest.read(Path(job.tokenizer))
            step, finish = getattr(gpu_speed_peers, row.kind)(job, context, tokenizer), _synchronize
        step()
        finish()
        first_step_s = time.time() - psutil.Process().create_time() - waited_s
        if row.model in LOSS_STEPS:
            for _ in range(job.steps - 1):
                step()
            finish()
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
            return {"losses": [found["loss"] for found in rows], "first_step_s": first_step_s}
        seconds = _blocks(step, finish)
        tokens = job.stage.global_batch_size * job.stage.sequence_length
        times = (
            kernel_times.profile(step, finish, tokens // job.world_size)
            if torch.cuda.is_available()
            else {"classes": {}, "kernels": {}}
        )
    return {
        **times,
        "tokens_per_s": tokens / statistics.median(seconds),
        "tokens_per_s_of_blocks": [round(tokens / each) for each in seconds],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
        "first_step_s": first_step_s,
    }


def _wait_for_gpu() -> float:
    started = time.perf_counter()
    sys.stdin.readline()
    return time.perf_counter() - started


def _longhaul(job: TrainSpec, context: DistributedContext, folder: Path) -> tuple[Step, Step]:
    trainer, batches = build_trainer(job, context, folder)

    def step() -> None:
        trainer.step(next(batches))

    def finish() -> None:
        trainer.settle()
        _synchronize()

    return step, finish


def _blocks(step: Step, finish: Step) -> list[float]:
    """Return the seconds per step of every block. The clock runs from one end of a block to the next."""
    for _ in range(WARM_UP_STEPS):
        step()
    finish()
    seconds = []
    for _ in range(BLOCKS):
        started = time.perf_counter()
        for _ in range(BLOCK_STEPS):
            step()
        finish()
        seconds.append((time.perf_counter() - started) / BLOCK_STEPS)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
