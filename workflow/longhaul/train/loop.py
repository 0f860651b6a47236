"""The training of one stage, from the first process to the last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

from longhaul.artifacts.schemas import Checkpoint, DataManifest, TokenizerManifest
from longhaul.data.sampling.samples import Samples
from longhaul.errors import DISK_FULL, DiskFull
from longhaul.jobs.specs import TrainSpec
from longhaul.runtime.heartbeat import Heartbeat
from longhaul.train.backend import Backend, make_backend
from longhaul.train.bad_steps import TrainingFailure, badness
from longhaul.train.batches import Batch, Prefetcher, validation_batches
from longhaul.train.build_model import build_model, restore_first_masters
from longhaul.train.checkpoint.manager import Checkpoints
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.checkpoint.weights_folder import (
    Start,
    claim_weights_folder,
    starting_checkpoint,
    weights_folder,
    weights_identity,
)
from longhaul.train.checkpoint.weights_lock import sole_writer
from longhaul.train.distributed_context import DistributedContext, distributed_context
from longhaul.train.export_reference import sample_prompts, write_proof
from longhaul.train.graceful_stop import Stopping
from longhaul.train.monitoring.events import Events
from longhaul.train.monitoring.metrics import Metrics, device_numbers
from longhaul.train.monitoring.stragglers import Stragglers
from longhaul.train.parallel.expert_balance import Load, load_summary
from longhaul.train.schedule import learning_rate


def run(job: TrainSpec) -> None:
    """Trains the stage, or goes on where its last complete checkpoint stands, and writes job.out last.

    When its allocation is about to end, it saves and leaves instead, with outcome.json.

    Raises:
        UserError: the job runs in another geometry than planned, or its inputs do not fit together.
        TrainingFailure: loss or gradients stayed non-finite beyond what the config allows.
    """
    with (
        distributed_context(job) as processes,
        Heartbeat(processes.rank, Path(job.folder), job.stage.recovery.heartbeat_timeout_s),
        _disk_full_told(Path(job.weights_root)),
    ):
        _run(job, processes)


@contextmanager
def _disk_full_told(folder: Path) -> Iterator[None]:
    """For small files, such as metrics; a checkpoint that finds no room says itself what it would have needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DiskFull(str(error.filename or "a file of the stage"), folder, 0, disk_usage(folder).free) from error


def _run(job: TrainSpec, processes: DistributedContext) -> None:
    tokenizer, data = TokenizerManifest.read(Path(job.tokenizer)), DataManifest.read(Path(job.data))
    start = starting_checkpoint(job)
    identity = weights_identity(job, data, tokenizer, start)
    weights = weights_folder(job, identity)
    with sole_writer(weights, processes):
        claim_weights_folder(job, identity, weights, processes)
        events = Events(weights if processes.is_main else None)
        checkpoints = Checkpoints(weights, job, processes, events)
        finished = checkpoints.finished() or _train(job, processes, tokenizer, data, start, checkpoints, events)
        if processes.is_main and finished:
            finished_stage(job, weights, checkpoints, data, tokenizer).write(Path(job.out))
        processes.barrier()


def finished_stage(
    job: TrainSpec, weights: Path, checkpoints: Checkpoints, data: DataManifest, tokenizer: TokenizerManifest
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
    job: TrainSpec,
    processes: DistributedContext,
    tokenizer: TokenizerManifest,
    data: DataManifest,
    start: Start | None,
    checkpoints: Checkpoints,
    events: Events,
) -> bool:
    """Whether the last step was reached."""
    stopping = Stopping(job, processes)
    cache = checkpoints.folder / "samples"
    train = open_samples(job, data, "train", cache, processes)
    held_out = open_samples(job, data, "validation", cache, processes)
    model = build_model(job, tokenizer, start, processes)
    backend = make_backend(job, model, processes)
    state = checkpoints.resume(backend.engine)
    if state.step == 0:
        restore_first_masters(backend.engine, job, tokenizer, start, processes)
    metrics = Metrics(job, checkpoints.folder, state.step, processes, model.config.to_dict(), events)
    prompts = sample_prompts(validation=held_out, train=train)
    trainer = Trainer(job, processes, backend, held_out, prompts, checkpoints, metrics, events, state)
    trainer.begin()
    stopping.require_time_for(trainer.leaving_takes_s)
    for batch in Prefetcher(train, job, processes, state):
        if not trainer.step(batch):
            continue
        if trainer.is_due(job.stage.validation.every_steps) or trainer.is_due(job.stage.checkpoints.every_steps):
            trainer.look_and_validate()
        if trainer.is_due(job.stage.checkpoints.every_steps):
            trainer.save()
        elif reason := stopping.reason(trainer.leaving_takes_s):
            trainer.save_unvalidated()
            stopping.leave(reason, trainer.state.step)
            break
    metrics.close()
    return trainer.state.step == job.steps


def open_samples(
    job: TrainSpec, data: DataManifest, split: str, cache: Path, processes: DistributedContext
) -> Samples | None:
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

    job: TrainSpec
    processes: DistributedContext
    backend: Backend
    held_out: Samples | None
    prompts: dict[str, Any]
    checkpoints: Checkpoints
    metrics: Metrics
    events: Events
    state: TrainingState

    def __post_init__(self) -> None:
        self.bad_in_a_row = 0
        self.validation_loss: float | None = None
        self.longest_s = {"step": 0.0, "validate": 0.0, "save": self.checkpoints.longest_save_s()}
        self.spent_s = dict.fromkeys(self.longest_s, 0.0)
        self.stragglers = Stragglers(self.processes, self.job.stage.recovery.straggler_threshold, self.events)
        self.backend.guard.judge = self._badness

    def _badness(self, loss: float, grad_norm: float) -> str | None:
        return badness(loss, grad_norm, self.state.recent_losses, self.job.stage.bad_steps.spike_factor)

    def begin(self) -> None:
        """Before the first step; where a bad step returns to a checkpoint, there must be one."""
        self.events.write("training", step=self.state.step)
        if self.state.step == 0:
            self.validate()
            if self.job.stage.bad_steps.policy == "roll_back":
                self.save()

    @property
    def leaving_takes_s(self) -> float:
        """What another step and a save may take, by what they took so far."""
        return 2 * self.longest_s["step"] + self.longest_s["validate"] + 1.5 * self.longest_s["save"]

    def _took(self, what: str, started: float) -> float:
        seconds = time.perf_counter() - started
        self.longest_s[what] = max(self.longest_s[what], seconds)
        self.spent_s[what] += seconds
        return seconds

    def is_due(self, every_steps: int) -> bool:
        """After every `every_steps` steps, and after the last one."""
        return self.state.step % every_steps == 0 or self.state.step == self.job.steps

    def step(self, batch: Batch) -> bool:
        """One optimizer step over a global batch; False when it was a bad one, which counts for nothing."""
        started = time.perf_counter()
        self.stragglers.waited(batch.wait_s)
        self.spent_s["step"] += batch.wait_s
        lr = learning_rate(self.job.stage.schedule, self.job.stage.optimizer.lr, self.state.step, self.job.steps)
        for group in self.backend.engine.optimizer.param_groups:
            group["lr"] = lr
        tokens = self._sum_over_samples(batch.loss_tokens)
        loss, guard = self.backend.train(batch, tokens), self.backend.guard
        balance = self.backend.balance.take()
        if guard.reason:
            self.backend.load.discard_step()
            self._answer_bad_step(batch, guard.reason, time.perf_counter() - started)
            return False
        loads = self._all_loads(self.backend.load.finish_step())
        self.state.finish_step(loss)
        self.metrics.step(
            self.state.step,
            seconds=self._took("step", started),
            values={
                "loss": loss,
                "grad_norm": guard.grad_norm(),
                "lr": lr,
                "loss_tokens": int(tokens),
                "data_wait_s": batch.wait_s,
                "batch": batch.number,
                "sample_ids": batch.ids_digest,
                **load_summary(loads),
                **({"expert_load": loads} if loads and self.is_due(self.job.stage.validation.every_steps) else {}),
                **self._balance_loss(balance),
            },
        )
        if self.job.stage.bad_steps.policy == "skip":
            self.bad_in_a_row = 0
        return True

    def _balance_loss(self, own: float) -> dict[str, float]:
        return {"balance_loss": self.processes.sum(own)} if self.job.stage.sequence_aux_loss_coef else {}

    def _sum_over_samples(self, value: float) -> float:
        """The sum of what every rank counted in its samples; ranks with the same samples count once."""
        return self.processes.sum(value if self.processes.dims.counts_samples else 0.0)

    def _all_loads(self, loads: Load) -> Load:
        """Those of the other pipeline stages too."""
        if self.job.stage.parallel.pipeline == 1:
            return loads
        return {layer: counts for part in self.processes.gather(loads) for layer, counts in part.items()}

    def _answer_bad_step(self, batch: Batch, reason: str, seconds: float) -> None:
        """Stops, skips the batch or rolls back, as the policy says."""
        settings, step = self.job.stage.bad_steps, self.state.step + 1
        self.bad_in_a_row += 1
        self.events.write(
            "bad_step",
            step=step,
            batch=batch.number,
            reason=reason,
            policy=settings.policy,
            seconds=round(seconds, 3),
        )
        if settings.policy == "stop" or self.bad_in_a_row > settings.limit:
            raise TrainingFailure(
                f"step {step}: {reason}; bad_steps.policy is {settings.policy}, its limit {settings.limit}. "
                f"Batch {batch.number}, samples {batch.ids[:8].tolist()}…",
                "look at the named samples, lower the learning rate, lengthen the warm-up, or choose another "
                "bad_steps.policy or limit; the stage goes on from its last checkpoint",
            )
        if settings.policy == "roll_back":
            self._roll_back(batch.number, settings.window_batches)
        else:
            self.state.leave_out({batch.number})
            self.metrics.note(f"step {step}: {reason}; batch {batch.number} is left out")
        self.checkpoints.record_skipped(self.state.skipped)

    def _roll_back(self, bad_batch: int, window_batches: int | None) -> None:
        """Returns to the last checkpoint; the batches from there to the bad one, or the last of them, are left out."""
        reached = self.state.step
        self.state.become(self.checkpoints.resume(self.backend.engine, is_needed=True))
        window = range(self.state.next_batch, bad_batch + 1)[-(window_batches or self.job.steps + bad_batch + 1) :]
        self.state.leave_out(set(window))
        self.metrics.roll_back(self.state.step)
        text = f"batches {window[0]} to {window[-1]} are left out"
        self.metrics.note(f"rolled back from step {reached} to step {self.state.step}; {text}")
        self.events.write("rolled_back", from_step=reached, to_step=self.state.step, batches=[window[0], window[-1]])

    def look_and_validate(self) -> None:
        """Looks for a rank that holds the others up, then validates."""
        self.stragglers.look(self.state.step, self.longest_s["step"])
        self.validate()

    def validate(self) -> None:
        """Mean loss over the loss tokens of the same held-out samples every time."""
        if self.held_out is None:
            return
        started = time.perf_counter()
        total = tokens = 0.0
        for micro in validation_batches(self.held_out, self.job, self.processes):
            total += self.backend.evaluate(micro)
            tokens += micro.loss_tokens
        self.validation_loss = self.processes.sum(total) / max(1.0, self._sum_over_samples(tokens))
        self.metrics.validation(self.state.step, self.validation_loss)
        self._took("validate", started)

    def save(self) -> None:
        """Saves a checkpoint; one that will be exported carries its proof."""
        self.bad_in_a_row = 0
        started = time.perf_counter()
        with_proof = self.checkpoints.is_exportable(self.state.step, self.validation_loss)
        with self.checkpoints.saving(self.backend.engine, self.state, self.validation_loss, with_proof) as folder:
            if with_proof:
                write_proof(self.backend, self.job, folder / "proof", self.processes, self.prompts)
        self.metrics.note(f"saved step {self.state.step}", **device_numbers(self.processes.device))
        self._took("save", started)
        self._record_save()

    def _record_save(self) -> None:
        """What the time since the last save went into."""
        names = {"step": "training_s", "validate": "validation_s", "save": "saving_s"}
        spent = {names[what]: round(seconds, 3) for what, seconds in self.spent_s.items()}
        self.events.write("saved", step=self.state.step, **spent)
        self.spent_s = dict.fromkeys(self.spent_s, 0.0)

    def save_unvalidated(self) -> None:
        """A save between validations: it is resumed from, and never the best."""
        self.validation_loss = None
        self.save()
