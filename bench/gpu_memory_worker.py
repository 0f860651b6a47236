"""Trains one option of bench/gpu_memory.py: python gpu_memory_worker.py FOLDER, where FOLDER contains job.json."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from bench.trainer_without_supervisor import build_trainer
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.distributed_context import distributed_context


def main() -> None:
    """Train the steps of the job and print {"peak_bytes", "held_bytes", "losses"}.

    peak_bytes is the peak of all tensors, held_bytes that of the allocator. On a CPU both are the memory of the process.
    """
    folder = Path(sys.argv[1])
    job = TrainSpec.read(folder / "job.json")
    with distributed_context(job) as context:
        trainer, batches = build_trainer(job, context, folder)
        for _ in range(job.steps):
            trainer.step(next(batches))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    on_gpu = context.device.type == "cuda"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = {
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else resident,
        "held_bytes": torch.cuda.max_memory_reserved() if on_gpu else resident,
        "losses": [row["loss"] for row in rows if "loss" in row],
    }
    print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
