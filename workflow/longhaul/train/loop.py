"""The training of one stage, from the first process to the last checkpoint."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longhaul.artifacts import Checkpoint, DataManifest, TokenizerManifest
from longhaul.data.samples import Samples
from longhaul.jobs import StageJob
from longhaul.train.batches import Batch, Prefetcher, validation_batches
from longhaul.train.checkpoints import Checkpoints, TrainingState
from longhaul.train.guard import NonfiniteGuard, TrainingFailure
from longhaul.train.heartbeat import Heartbeat
from longhaul.train.identity import Start, claim_weights_folder, starting_checkpoint, weights_folder, weights_identity
from longhaul.train.loss import global_loss, loss_sum
from longhaul.train.metrics import Metrics, device_numbers
from longhaul.train.model import build_model, make_engine
from longhaul.train.processes import Processes, start_processes
from longhaul.train.proof import write_proof
from longhaul.train.schedule import learning_rate
from longhaul.train.stopping import Stopping
from longhaul.train.writer import sole_writer


def run(job: StageJob) -> None:
    """Trains the stage, or goes on where its last complete checkpoint stands, and writes job.out last.

    When its allocation is about to end, it saves and leaves instead, with outcome.json.

    Raises:
        UserError: the job runs in another geometry than planned, or its inputs do not fit together.
        TrainingFailure: loss or gradients stayed non-finite beyond what the config allows.
    """
    with start_processes(job) as processes, Heartbeat(processes.rank, Path(job.folder), job.stage.recovery.hang_s):
        _run(job, processes)


def _run(job: StageJob, processes: Processes) -> None:
    tokenizer, data = TokenizerManifest.read(Path(job.tokenizer)), DataManifest.read(Path(job.data))
    start = starting_checkpoint(job)
    identity = weights_identity(job, data, tokenizer, start)
    weights = weights_folder(job, identity)
    with sole_writer(weights, processes):
        claim_weights_folder(job, identity, weights, processes)
        checkpoints = Checkpoints(weights, job, processes)
        finished = checkpoints.finished() or _train(job, processes, tokenizer, data, start, checkpoints)
        if processes.is_main and finished:
            finished_stage(job, weights, checkpoints, data, tokenizer).write(Path(job.out))
        processes.barrier()


def finished_stage(
    job: StageJob, weights: Path, checkpoints: Checkpoints, data: DataManifest, tokenizer: TokenizerManifest
) -> Checkpoint:
    """The artefact of a finished stage; it holds no time and no host, so that the same weights give the same bytes."""
    return Checkpoint(
        run=job.run,
        stage=job.stage.name,
        weights=str(weights),
        spec=job.spec,
        checkpoints=checkpoints.last_and_best(),
        steps=job.steps,
        data_hash=data.hash,
        tokenizer_hash=tokenizer.hash,
    )


def _train(
    job: StageJob,
    processes: Processes,
    tokenizer: TokenizerManifest,
    data: DataManifest,
    start: Start | None,
    checkpoints: Checkpoints,
) -> bool:
    """Whether the last step was reached."""
    stopping = Stopping(job, processes)
    cache = checkpoints.folder / "samples"
    train = open_samples(job, data, "train", cache, processes)
    held_out = open_samples(job, data, "validation", cache, processes)
    model = build_model(job, tokenizer, start, processes)
    engine = make_engine(job, model)
    state = checkpoints.resume(engine)
    metrics = Metrics(job, checkpoints.folder, state.step, processes, model.config.to_dict())
    trainer = Trainer(job, processes, engine, held_out, checkpoints, metrics, state)
    if state.step == 0:
        trainer.validate()
    for batch in Prefetcher(train, job, processes, first_step=state.step):
        trainer.step(batch)
        if trainer.is_due(job.stage.validation.every_steps) or trainer.is_due(job.stage.checkpoints.every_steps):
            trainer.validate()
        if trainer.is_due(job.stage.checkpoints.every_steps):
            trainer.save()
        elif reason := stopping.reason(trainer.leaving_takes_s):
            trainer.save_unvalidated()
            stopping.leave(reason, trainer.state.step)
            break
    metrics.close()
    return trainer.state.step == job.steps


def open_samples(job: StageJob, data: DataManifest, split: str, cache: Path, processes: Processes) -> Samples | None:
    """A split's samples; None when it has none. Rank 0 goes first: it makes the packs that the others map."""
    if not data.splits.get(split, {}).get("documents"):
        return None
    arguments = (data, split, job.stage.kind, job.stage.sequence_length, job.seed, cache)
    if processes.is_main:
        Samples.open(*arguments)
    processes.barrier()
    return Samples.open(*arguments)


@dataclass
class Trainer:
    """What a step needs, and the state that it moves on."""

    job: StageJob
    processes: Processes
    engine: Any
    held_out: Samples | None
    checkpoints: Checkpoints
    metrics: Metrics
    state: TrainingState

    def __post_init__(self) -> None:
        self.guard = NonfiniteGuard(self.engine)
        self.failures_in_a_row = 0
        self.validation_loss: float | None = None
        self.longest_s = {"step": 0.0, "validate": 0.0, "save": 0.0}

    @property
    def leaving_takes_s(self) -> float:
        """What another step and a save may take, by what they took so far."""
        return 2 * self.longest_s["step"] + self.longest_s["validate"] + 1.5 * self.longest_s["save"]

    def _took(self, what: str, started: float) -> float:
        seconds = time.perf_counter() - started
        self.longest_s[what] = max(self.longest_s[what], seconds)
        return seconds

    def is_due(self, every_steps: int) -> bool:
        """After every `every_steps` steps, and after the last one."""
        return self.state.step % every_steps == 0 or self.state.step == self.job.steps

    def step(self, batch: Batch) -> None:
        """One optimizer step over a global batch."""
        started = time.perf_counter()
        lr = learning_rate(self.job.stage.schedule, self.job.stage.optimizer.lr, self.state.step, self.job.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        tokens = self.processes.sum(batch.loss_tokens)
        loss = self.processes.sum(self._accumulate(batch, tokens)) / max(1.0, tokens)
        grad_norm = self.guard.grad_norm()
        self.state.step += 1
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        self._note_nonfinite(finite, loss, grad_norm, batch)
        self.metrics.step(
            self.state.step,
            seconds=self._took("step", started),
            values={
                "loss": loss,
                "grad_norm": grad_norm,
                "lr": lr,
                "loss_tokens": int(tokens),
                "data_wait_s": batch.wait_s,
                "skipped": not finite,
                "sample_ids": batch.ids_digest,
            },
        )

    def _accumulate(self, batch: Batch, tokens: float) -> float:
        """Forward and backward of this rank's micro batches; returns the sum of its token losses."""
        total = 0.0
        for micro in batch.micro_batches:
            summed = loss_sum(self.engine, micro.to(self.processes.device))
            self.engine.backward(global_loss(summed, tokens, self.job.data_parallel, self.job.accumulation))
            if self.engine.is_gradient_accumulation_boundary():
                self.guard.measure_plain()
            self.engine.step()
            total += summed.item()
        return total

    def _note_nonfinite(self, finite: bool, loss: float, grad_norm: float, batch: Batch) -> None:
        self.failures_in_a_row = 0 if finite else self.failures_in_a_row + 1
        if finite:
            return
        self.state.skipped.append(self.state.step - 1)
        allowed = self.job.stage.nonfinite.skip_steps
        if self.failures_in_a_row > allowed:
            raise TrainingFailure(
                f"step {self.state.step}: loss {loss}, gradient norm {grad_norm}; {self.failures_in_a_row} steps in a row were "
                f"not finite, nonfinite.skip_steps allows {allowed}. Samples {batch.ids[:8].tolist()}…",
                "lower the learning rate, lengthen the warm-up, look at the named samples, or raise nonfinite.skip_steps",
            )

    def validate(self) -> None:
        """Mean loss over the loss tokens of the same held-out samples every time."""
        if self.held_out is None:
            return
        started = time.perf_counter()
        self.engine.eval()
        total = tokens = 0.0
        with torch.no_grad():
            for micro in validation_batches(self.held_out, self.job, self.processes):
                total += loss_sum(self.engine, micro.to(self.processes.device)).item()
                tokens += micro.loss_tokens
        self.engine.train()
        self.validation_loss = self.processes.sum(total) / max(1.0, self.processes.sum(tokens))
        self.metrics.validation(self.state.step, self.validation_loss)
        self._took("validate", started)

    def save(self) -> None:
        """Saves a checkpoint; one that will be exported carries its proof."""
        started = time.perf_counter()
        with_proof = self.checkpoints.is_exportable(self.state.step, self.validation_loss)
        with self.checkpoints.saving(self.engine, self.state, self.validation_loss, with_proof) as folder:
            if with_proof:
                write_proof(self.engine, self.job, folder / "proof", self.processes)
        self.metrics.note(f"saved step {self.state.step}", **device_numbers(self.processes.device))
        self._took("save", started)

    def save_unvalidated(self) -> None:
        """A save between validations: it is resumed from, and never the best."""
        self.validation_loss = None
        self.save()
