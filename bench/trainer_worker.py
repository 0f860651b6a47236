"""One process of bench/trainer.py. Arguments: a training job's spec, and the command to print in the record."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe_machine, write_result
from bench.trainer_without_supervisor import build_trainer
from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.batches import MicroBatch
from longhaul.train.build_model import build_model
from longhaul.train.deepspeed_engine import read_deepspeed_config
from longhaul.train.distributed_context import DistributedContext, distributed_context

ROUNDS, STEPS_PER_ROUND = 9, 2
Step = Callable[[], None]


def main() -> None:
    """Build the three loops and run them in turns."""
    job = TrainSpec.read(Path(sys.argv[1]))
    with distributed_context(job) as context, tempfile.TemporaryDirectory() as name:
        tokenizer = TokenizerManifest.read(Path(job.tokenizer))
        ours, micro_batches = _ours(job, context, Path(name))
        loops = {
            "longhaul": ours,
            "deepspeed.initialize": _bare_deepspeed(job, context, tokenizer, micro_batches),
            "PyTorch DDP": _bare_torch(job, context, tokenizer, micro_batches),
        }
        seconds = _in_turns(loops, context)
        if context.is_main:
            _publish(job, seconds)


def _ours(job: TrainSpec, context: DistributedContext, folder: Path) -> tuple[Step, list[MicroBatch]]:
    trainer, batches = build_trainer(job, context, folder)
    first = next(batches)
    following = chain([first], batches)

    def step() -> None:
        trainer.step(next(following))

    return step, first.micro_batches


def _bare_deepspeed(
    job: TrainSpec, context: DistributedContext, tokenizer: TokenizerManifest, batches: list[MicroBatch]
) -> Step:
    import deepspeed

    model = build_model(job, tokenizer, None, context)
    engine: Any = deepspeed.initialize(model=model, config=read_deepspeed_config(job))[0]

    def step() -> None:
        for batch in batches:
            loss = engine(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss
            engine.backward(loss)
            engine.step()

    return step


def _bare_torch(
    job: TrainSpec, context: DistributedContext, tokenizer: TokenizerManifest, batches: list[MicroBatch]
) -> Step:
    model = torch.nn.parallel.DistributedDataParallel(build_model(job, tokenizer, None, context))
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.stage.optimizer.lr)

    def step() -> None:
        for batch in batches:
            loss = model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.stage.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _in_turns(loops: dict[str, Step], context: DistributedContext) -> dict[str, list[float]]:
    """Return the seconds per step of every round; each round begins with another loop."""
    for step in loops.values():
        step()  # the first step allocates memory
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for index in range(ROUNDS):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            context.barrier()
            started = time.perf_counter()
            for step in repeat(loops[name], STEPS_PER_ROUND):
                step()
            context.barrier()
            seconds[name].append((time.perf_counter() - started) / STEPS_PER_ROUND)
    return seconds


def _publish(job: TrainSpec, seconds: dict[str, list[float]]) -> None:
    tokens = job.stage.global_batch_size * job.stage.sequence_length
    lines = [f"{name:22} {tokens / statistics.median(steps_s):9,.0f} tokens/s" for name, steps_s in seconds.items()]
    ours = seconds["longhaul"]
    for name in list(seconds)[1:]:
        ratios = [other_s / own_s for own_s, other_s in zip(ours, seconds[name], strict=True)]
        lines.append(
            f"longhaul / {name}: {statistics.median(ratios):.3f}, median of {len(ratios)} pairs "
            f"(from {min(ratios):.3f} to {max(ratios):.3f})"
        )
    facts = f"{job.world_size} processes, micro batch {job.stage.micro_batch_size}, sequence length {job.stage.sequence_length}"
    versions = describe_machine(("torch", "deepspeed", "transformers"), ("-m", "bench.trainer"))
    write_result(
        "trainer",
        [
            *versions,
            f"demo's pretraining stage: {facts}, ZeRO {job.stage.zero.stage}",
            *lines,
            "aim: >= 0.97 of deepspeed.initialize",
        ],
    )


if __name__ == "__main__":
    main()
