"""One process of bench/communication.py. Arguments: a stage's payload, steps, file for what was found (".<rank>" is added)."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from longhaul.artifacts import DataManifest, TokenizerManifest
from longhaul.jobs import StageJob
from longhaul.ranks import leave
from longhaul.train.backend import make_backend
from longhaul.train.batches import Prefetcher
from longhaul.train.checkpoints import Checkpoints
from longhaul.train.events import Events
from longhaul.train.loop import Trainer, open_samples
from longhaul.train.metrics import Metrics
from longhaul.train.model import build_model
from longhaul.train.processes import Processes, start_processes
from longhaul.train.state import TrainingState


def main() -> None:
    job, steps, out = StageJob.read(Path(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
    with start_processes(job) as processes, tempfile.TemporaryDirectory() as name:
        found = train(job, steps, processes, Path(name))
        out.with_suffix(f".{processes.rank.rank}").write_text(json.dumps(found))
        processes.barrier()
    leave()


def train(job: StageJob, steps: int, processes: Processes, folder: Path) -> dict[str, list[float]]:
    """Of each step: its seconds, those of the reduction in it, bytes sent, loss."""
    tokenizer = TokenizerManifest.read(Path(job.tokenizer))
    samples = open_samples(job, DataManifest.read(Path(job.data)), "train", folder, processes)
    backend = make_backend(job, build_model(job, tokenizer, None, processes), processes)
    events, state = Events(None), TrainingState()
    metrics = Metrics(job, folder, 0, processes, job.model, events)
    trainer = Trainer(
        job, processes, backend, None, Checkpoints(folder, job, processes, events), metrics, events, state
    )
    found: dict[str, list[float]] = {"step_s": [], "reduction_s": [], "sent_bytes": [], "loss": []}
    reduce = backend.engine.allreduce_gradients

    def timed_reduction(*arguments: object, **options: object) -> None:
        if not backend.engine.is_gradient_accumulation_boundary():
            return reduce(*arguments, **options)
        processes.barrier()  # waiting for a slower peer is no communication
        started = time.perf_counter()
        reduce(*arguments, **options)
        found["reduction_s"].append(time.perf_counter() - started)

    backend.engine.allreduce_gradients = timed_reduction
    for _, batch in zip(range(steps), Prefetcher(samples, job, processes, state), strict=False):
        sent, started = sent_bytes(), time.perf_counter()
        trainer.step(batch)
        found["step_s"].append(time.perf_counter() - started)
        found["sent_bytes"].append(sent_bytes() - sent)
        found["loss"].append(state.recent_losses[-1])
    return found


def sent_bytes() -> int:
    """What this host's interface counted so far: the ninth number of its line."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (line,) = [line for line in lines if line.strip().startswith("eth0:")]
    return int(line.split(":")[1].split()[8])


if __name__ == "__main__":
    main()
