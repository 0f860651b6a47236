"""One process of bench/communication.py.

Arguments: a training job's spec, the number of steps, the file for the measurements (".<rank>" is added).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from bench.trainer_without_supervisor import build_trainer
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.runtime.process_rank import exit_without_cleanup
from longhaul.train.distributed_context import DistributedContext, distributed_context


def main() -> None:
    job, steps, out = TrainSpec.read(Path(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
    with distributed_context(job) as context, tempfile.TemporaryDirectory() as name:
        measured = train(job, steps, context, Path(name))
        out.with_suffix(f".{context.rank.rank}").write_text(json.dumps(measured))
        context.barrier()
    exit_without_cleanup()


def train(job: TrainSpec, steps: int, context: DistributedContext, folder: Path) -> dict[str, list[float]]:
    """Return lists with one entry per step: its seconds, those of the reduction in it, bytes sent, loss."""
    trainer, batches = build_trainer(job, context, folder)
    engine = trainer.backend.engine
    measured: dict[str, list[float]] = {"step_s": [], "reduction_s": [], "sent_bytes": [], "loss": []}
    reduce = engine.allreduce_gradients

    def timed_reduction(*arguments: object, **options: object) -> None:
        if not engine.is_gradient_accumulation_boundary():
            return reduce(*arguments, **options)
        context.barrier()  # waiting for a slower peer does not count as communication
        started = time.perf_counter()
        reduce(*arguments, **options)
        measured["reduction_s"].append(time.perf_counter() - started)

    engine.allreduce_gradients = timed_reduction
    for _ in range(steps):
        batch = next(batches)
        sent, started = sent_bytes(), time.perf_counter()
        trainer.step(batch)
        measured["step_s"].append(time.perf_counter() - started)
        measured["sent_bytes"].append(sent_bytes() - sent)
        measured["loss"].append(trainer.state.recent_losses[-1])
    return measured


def sent_bytes() -> int:
    """Return the bytes that this host's interface has sent so far: the ninth number of its line."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (line,) = [line for line in lines if line.strip().startswith("eth0:")]
    return int(line.split(":")[1].split()[8])


if __name__ == "__main__":
    main()
