"""One process of bench/communication.py. Arguments: a stage's payload, steps, file for what was found (".<rank>" is added)."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from bench.stepping import open_trainer
from longhaul.jobs.specs import TrainSpec
from longhaul.runtime.rank import leave
from longhaul.train.distributed_context import DistributedContext, distributed_context


def main() -> None:
    job, steps, out = TrainSpec.read(Path(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
    with distributed_context(job) as processes, tempfile.TemporaryDirectory() as name:
        found = train(job, steps, processes, Path(name))
        out.with_suffix(f".{processes.rank.rank}").write_text(json.dumps(found))
        processes.barrier()
    leave()


def train(job: TrainSpec, steps: int, processes: DistributedContext, folder: Path) -> dict[str, list[float]]:
    """Of each step: its seconds, those of the reduction in it, bytes sent, loss."""
    trainer, batches = open_trainer(job, processes, folder)
    engine = trainer.backend.engine
    found: dict[str, list[float]] = {"step_s": [], "reduction_s": [], "sent_bytes": [], "loss": []}
    reduce = engine.allreduce_gradients

    def timed_reduction(*arguments: object, **options: object) -> None:
        if not engine.is_gradient_accumulation_boundary():
            return reduce(*arguments, **options)
        processes.barrier()  # waiting for a slower peer is no communication
        started = time.perf_counter()
        reduce(*arguments, **options)
        found["reduction_s"].append(time.perf_counter() - started)

    engine.allreduce_gradients = timed_reduction
    for _ in range(steps):
        batch = next(batches)
        sent, started = sent_bytes(), time.perf_counter()
        trainer.step(batch)
        found["step_s"].append(time.perf_counter() - started)
        found["sent_bytes"].append(sent_bytes() - sent)
        found["loss"].append(trainer.state.recent_losses[-1])
    return found


def sent_bytes() -> int:
    """What this host's interface counted so far: the ninth number of its line."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (line,) = [line for line in lines if line.strip().startswith("eth0:")]
    return int(line.split(":")[1].split()[8])


if __name__ == "__main__":
    main()
