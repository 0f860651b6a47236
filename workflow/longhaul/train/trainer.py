"""Performs one optimizer step, one validation and one save, and collects a step's metrics; train_stage.py decides when."""

from __future__ import annotations

import time
from dataclasses import dataclass

from longhaul.data.sampling.samples import Samples
from longhaul.errors import InputError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.batches import Batch
from longhaul.train.checkpoint.checkpoint_folders import reference_folder
from longhaul.train.checkpoint.checkpoint_manager import CheckpointManager
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.deepspeed_engine import peak_learning_rate
from longhaul.train.detect_bad_steps import SPIKE_WINDOW_STEPS, bad_step_reason
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.graceful_stop import needed_to_leave_s
from longhaul.train.handle_bad_steps import BadStepPolicy
from longhaul.train.host_copy import HostCopy
from longhaul.train.lr_schedule import learning_rate
from longhaul.train.monitoring.events import EventWriter
from longhaul.train.monitoring.metrics import Metrics
from longhaul.train.monitoring.stragglers import StragglerDetector
from longhaul.train.parallel.expert_load_balancing import Load, load_summary
from longhaul.train.phase_times import SAVE, STEP, VALIDATE, PhaseTimes, StartUpTimes
from longhaul.train.random_numbers import seed_random_numbers
from longhaul.train.step_backends import Backend
from longhaul.train.validation_loss import sums_over_samples, validation_loss
from longhaul.train.write_reference_values import write_reference_values


def require_loss_tokens(tokens: float, batch: int, step: int) -> None:
    """Raise UserError for a global batch without a loss token: its step would only decay the weights."""
    if not tokens:
        raise InputError(
            f"batch {batch}, after {step} steps, holds no loss token: there is nothing to learn from it",
            f"add {batch} to the stage's skip_batches, and look at the data with longhaul data inspect",
        )


@dataclass(frozen=True)
class StartedStep:
    """A step that the device has got, and whose result the CPU may not know yet.

    number: of the step, counted from 1
    began:  time.perf_counter()
    loads:  of the experts, by layer
    """

    number: int
    batch: Batch
    lr: float
    began: float
    results: HostCopy
    loads: HostCopy


@dataclass
class Trainer:
    """Everything that a step needs, and the state that it changes.

    held_out: validation samples; None where the dataset has none
    prompts:  beginnings of documents that the export completes
    """

    job: TrainSpec
    context: DistributedContext
    backend: Backend
    held_out: Samples | None
    prompts: dict[str, object]
    checkpoints: CheckpointManager
    metrics: Metrics
    events: EventWriter
    state: TrainingState
    start_up: StartUpTimes

    def __post_init__(self) -> None:
        self.validation_loss: float | None = None
        self._started: StartedStep | None = None
        self._last_finished = 0.0
        self.times = PhaseTimes()
        self.checkpoints.read_longest_save()
        self._peak_lr = peak_learning_rate(self.job)
        self._stragglers = StragglerDetector(self.context, self.job.stage.recovery.straggler_threshold, self.events)
        self._policy = BadStepPolicy(
            self.job, self.backend.engine, self.state, self.checkpoints, self.metrics, self.events
        )
        self.backend.bad_steps.find_problem = self._problem

    def _problem(self, loss: float, grad_norm: float) -> str | None:
        return bad_step_reason(loss, grad_norm, self.state.recent_losses, self.job.stage.bad_steps.spike_factor)

    def begin(self) -> None:
        """Validate the initial weights where the config asks for it, and save where a bad step returns to a checkpoint."""
        self.events.write("training", step=self.state.step)
        if self.state.step == 0:
            if self.job.stage.validation.before_first_step:
                self.validate()
            if self._policy.needs_first_checkpoint:
                self.save()
                self.checkpoints.finish_save()

    @property
    def needed_to_leave_s(self) -> float:
        """Return the time that another step, a validation and a save may take."""
        return needed_to_leave_s(self.times, self.checkpoints.longest_save_s, self.checkpoints.is_saving)

    def is_due(self, every_steps: int) -> bool:
        """Return whether something is due that happens every `every_steps` steps and after the last one."""
        return _is_due(self.state.step, every_steps, self.job.steps)

    def step(self, batch: Batch) -> bool:
        """Run one optimizer step over a global batch. Return False for a bad step, which leaves the weights unchanged.

        On GPUs the result of a step is read when the next one has started, so that the GPU never waits for the CPU. If it was
        bad, both steps are taken back: the later one has changed nothing either.
        """
        earlier, self._started = self._started, self._start(batch)
        if earlier and not self._finish(earlier):
            return False
        stage = self.job.stage
        result_is_due = self.is_due(stage.checkpoints.every_steps) or self.is_due(stage.validation.every_steps)
        return self.settle() if result_is_due or not self.backend.bad_steps.is_delayed else True

    def settle(self) -> bool:
        """Read the result of the last step, if that is still to be done. Return False if it was bad."""
        started, self._started = self._started, None
        return started is None or self._finish(started)

    def _start(self, batch: Batch) -> StartedStep:
        """Give the device everything that a step computes, and count the step as done."""
        started = time.perf_counter()
        seed_random_numbers(self.job.seed, self.state.step, self.context.rank.rank)
        self._stragglers.record_wait(batch.wait_s)
        self.times.add(STEP, batch.wait_s)
        lr = self._set_learning_rate()
        counts = [batch.tokens, batch.loss_tokens, batch.attention_pairs]
        tokens, loss_tokens, attention_pairs = sums_over_samples(counts, self.context)
        examined = self.backend.train(batch, loss_tokens)
        results = {
            "loss": examined.loss,
            "examined_norm": examined.grad_norm,
            "grad_norm": self.backend.bad_steps.grad_norm(examined),
            "is_bad": examined.is_bad,
            "tokens": tokens,
            "loss_tokens": loss_tokens,
            "attention_pairs": attention_pairs,
        }
        if self.job.stage.sequence_aux_loss_coef:
            results["balance_loss"] = self.context.sums_on_device([self.backend.balance.pop_loss()])[0]
        loads = HostCopy(self.backend.load.finish_step(1 - examined.is_bad))
        self.state.step += 1
        return StartedStep(self.state.step, batch, lr, started, HostCopy(results), loads)

    def _finish(self, step: StartedStep) -> bool:
        """Read a step's result, and record it or draw the consequences of a bad step. Return False for a bad one."""
        results = {name: tensor.item() for name, tensor in step.results.read().items()}
        require_loss_tokens(results["loss_tokens"], step.batch.number, step.number - 1)
        # A step that began before the last one was over counts from there, without the wait for its data.
        began = max(step.began, self._last_finished + step.batch.wait_s)
        if results["is_bad"]:
            # A later step has started with the wrong batch or learning rate; the backend has not applied it.
            self._started, self.state.step = None, step.number - 1
            self.backend.bad_steps.acknowledge()
            reason = self._problem(results["loss"], results["examined_norm"]) or "not finite"
            self._policy.apply(step.batch, reason, time.perf_counter() - began)
            return False
        self.state.add_loss(results["loss"], SPIKE_WINDOW_STEPS)
        seconds = self.times.finish(STEP, began)
        self._last_finished = time.perf_counter()
        self.metrics.step(step.number, seconds, self._metrics_of(step, results))
        self._policy.note_good_step()
        if not self.start_up.is_complete:
            self.start_up.finish("first_step")
            self.events.write("start_up", step=step.number, **self.start_up.seconds())
            self.metrics.print(str(self.start_up))
        return True

    def _metrics_of(self, step: StartedStep, results: dict[str, float]) -> dict[str, object]:
        """Return the metrics of a good step; every rank calls this, as pipeline ranks exchange the loads of their experts."""
        loads = self._gather_loads({layer: counts.tolist() for layer, counts in step.loads.read().items()})
        values: dict[str, object] = {
            "loss": results["loss"],
            "grad_norm": results["grad_norm"],
            "lr": step.lr,
            "tokens": int(results["tokens"]),
            "loss_tokens": int(results["loss_tokens"]),
            "attention_pairs": int(results["attention_pairs"]),
            "data_wait_s": step.batch.wait_s,
            "batch": step.batch.number,
            "sample_ids": step.batch.ids_digest,
            **load_summary(loads),
        }
        if loads and _is_due(step.number, self.job.stage.validation.every_steps, self.job.steps):
            values["expert_load"] = loads
        if "balance_loss" in results:
            values["balance_loss"] = results["balance_loss"]
        return values

    def _set_learning_rate(self) -> float:
        lr = learning_rate(self.job.stage.schedule, self._peak_lr, self.state.step, self.job.steps)
        for group in self.backend.engine.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _gather_loads(self, loads: Load) -> Load:
        """Return the loads of the layers on all pipeline ranks."""
        if self.job.stage.parallel.pipeline == 1:
            return loads
        return {layer: counts for part in self.context.gather(loads) for layer, counts in part.items()}

    def check_stragglers(self) -> None:
        """Look for a rank that delays the others."""
        self._stragglers.check(self.state.step, self.times.longest_s[STEP])

    def validate(self) -> None:
        """Measure the validation loss, where there are held-out samples."""
        if self.held_out is None:
            return
        started = time.perf_counter()
        self.validation_loss = validation_loss(self.backend, self.held_out, self.job, self.context)
        if self.validation_loss is None:
            self.metrics.print(
                f"step {self.state.step}: the validation samples hold no loss token, so nothing was measured"
            )
        else:
            self.metrics.validation(self.state.step, self.validation_loss)
        self.times.finish(VALIDATE, started)

    def save(self) -> None:
        """Save a checkpoint, with reference values where it may be exported. Its files are written while training continues."""
        self.checkpoints.finish_save()  # one save at a time
        self._policy.note_save()
        started = time.perf_counter()
        with_reference = self.checkpoints.needs_reference_values(self.state.step, self.validation_loss)
        with self.checkpoints.saving(self.backend.engine, self.state, self.validation_loss, with_reference) as folder:
            if with_reference:
                write_reference_values(self.backend, self.job, reference_folder(folder), self.context, self.prompts)
        copied_at = started + self.times.finish(SAVE, started)
        self.checkpoints.start_writing(self.times.pop_since_save(), copied_at)

    def save_unvalidated(self) -> None:
        """Save between validations: the checkpoint is for a resume, and never the best one."""
        self.validation_loss = None
        self.save()


def _is_due(step: int, every_steps: int, last_step: int) -> bool:
    return step % every_steps == 0 or step == last_step
