"""Runs the training of one stage in order: lock, verify, build, resume, loop over steps, stop, final artifact; trainer.py does
each step.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from longhaul.artifacts.artifact_schemas import Checkpoint, DataManifest, TokenizerManifest
from longhaul.artifacts.atomic_files import disk_full_as_user_error, file_sha256
from longhaul.artifacts.pack_totals import cut_loss_share
from longhaul.artifacts.paths import WeightsFolder
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.runtime.heartbeat import Heartbeat
from longhaul.train.batches import Prefetcher
from longhaul.train.build_model import build_model, build_model_config
from longhaul.train.checkpoint.checkpoint_manager import CheckpointManager
from longhaul.train.checkpoint.weights_folder import claim_weights_folder
from longhaul.train.checkpoint.weights_identity import (
    StartingCheckpoint,
    find_starting_checkpoint,
    weights_folder,
    weights_identity,
)
from longhaul.train.checkpoint.weights_lock import hold_weights_lock
from longhaul.train.count_steps import with_counted_steps
from longhaul.train.distributed_context import DistributedContext, distributed_context
from longhaul.train.graceful_stop import GracefulStop
from longhaul.train.initial_weights import set_initial_master_weights
from longhaul.train.monitoring.events import EventWriter
from longhaul.train.monitoring.metrics import Metrics
from longhaul.train.monitoring.profile_steps import StepProfiler
from longhaul.train.open_samples import open_samples
from longhaul.train.out_of_memory import names_smaller_settings
from longhaul.train.phase_times import StartUpTimes
from longhaul.train.sample_prompts import sample_prompts
from longhaul.train.step_backends import build_backend
from longhaul.train.trainer import Trainer
from longhaul.train.verified_inputs import verify_data, verify_packs, verify_start


def run(job: TrainSpec) -> None:
    """Train the stage from its start or its last checkpoint. Write job.out last.

    Near the end of its allocation the training saves, writes outcome.json and returns.

    Raises:
        UserError: the number of ranks or nodes differs from the plan, or the inputs do not fit together.
        TrainingFailure: there were more bad steps than the config allows.
    """
    start_up = StartUpTimes()
    with (
        distributed_context(job) as context,
        Heartbeat(context.rank, Path(job.folder), job.stage.recovery.heartbeat_timeout_s),
        # A small file, such as metrics. A checkpoint raises DiskFull itself, with the needed bytes.
        disk_full_as_user_error("a file of the stage", Path(job.weights_root)),
        names_smaller_settings(job),
    ):
        start_up.finish("rendezvous")
        _train_or_finish(job, context, start_up)


def _train_or_finish(job: TrainSpec, context: DistributedContext, start_up: StartUpTimes) -> None:
    """Train unless the last checkpoint exists already, and write the stage's artifact when it does."""
    tokenizer, data = TokenizerManifest.read(Path(job.tokenizer)), DataManifest.read(Path(job.data))
    start = find_starting_checkpoint(job)
    identity = weights_identity(job, data, tokenizer, start)
    weights = weights_folder(job, identity)
    with hold_weights_lock(weights, context):
        job = with_counted_steps(job, data, WeightsFolder(weights), context)
        claim_weights_folder(job, identity, weights, context)
        events = EventWriter(weights if context.is_main else None)
        with closing(CheckpointManager(weights, job, context, events)) as checkpoints:
            is_finished = checkpoints.is_finished() or _train(
                job, context, tokenizer, data, start, checkpoints, events, start_up
            )
        if context.is_main and is_finished:
            stage_artifact(job, checkpoints, data, tokenizer).write(Path(job.out))
        context.barrier()


def stage_artifact(
    job: TrainSpec, checkpoints: CheckpointManager, data: DataManifest, tokenizer: TokenizerManifest
) -> Checkpoint:
    """Return the artifact of a finished stage. It has no time and no host, so equal weights give equal bytes."""
    return Checkpoint(
        run=job.run,
        stage=job.stage.name,
        weights=str(checkpoints.folder),
        spec=job.spec,
        checkpoints=checkpoints.last_and_best(),
        steps=job.steps,
        data_hash=data.hash,
        tokenizer_hash=tokenizer.hash,
        configs={path.name: file_sha256(path) for path in WeightsFolder(checkpoints.folder).exported_configs()},
    )


def _train(
    job: TrainSpec,
    context: DistributedContext,
    tokenizer: TokenizerManifest,
    data: DataManifest,
    start: StartingCheckpoint | None,
    checkpoints: CheckpointManager,
    events: EventWriter,
    start_up: StartUpTimes,
) -> bool:
    """Train to the last step, or until the job must stop. Return whether the last step was reached."""
    graceful_stop = GracefulStop(job, context)
    verify_data(job, data, WeightsFolder(checkpoints.folder), context)
    if start and not checkpoints.has_any():
        verify_start(start, context)
    cache = WeightsFolder(checkpoints.folder).samples
    samples = open_samples(job, data, "train", cache, context)
    held_out = open_samples(job, data, "validation", cache, context)
    verify_packs(cache, context)
    start_up.finish("data")
    model = build_model(job, tokenizer, start, context)
    start_up.finish("model")
    backend = build_backend(job, model, context)
    start_up.finish("engine")
    state = checkpoints.resume(backend.engine)
    if state.step == 0:
        set_initial_master_weights(backend.engine, job, build_model_config(job, tokenizer), start, context)
    epochs = samples.epochs(job.steps * job.stage.global_batch_size) if samples else {}
    cut_share = cut_loss_share(samples.pack_totals) if samples else None
    metrics = Metrics(job, checkpoints.folder, state.step, context, model.config.to_dict(), events, epochs, cut_share)
    prompts = sample_prompts(validation=held_out, train=samples)
    trainer = Trainer(job, context, backend, held_out, prompts, checkpoints, metrics, events, state, start_up)
    start_up.finish("checkpoint")
    trainer.begin()
    start_up.finish("validation")
    graceful_stop.require_time_for(trainer.needed_to_leave_s)
    with closing(StepProfiler(job, context, checkpoints.folder)) as profiler:
        _run_steps(trainer, Prefetcher(samples, job, context, state), graceful_stop, profiler)
    checkpoints.finish_save()
    metrics.close()
    return trainer.state.step == job.steps


def _run_steps(trainer: Trainer, batches: Prefetcher, graceful_stop: GracefulStop, profiler: StepProfiler) -> None:
    """Run steps with their validations and saves, until there are no more batches or the job must stop."""
    stage = trainer.job.stage
    for batch in batches:
        profiler.begin_step(trainer.state.step + 1)
        is_good = trainer.step(batch)
        profiler.end_step()
        if not is_good:
            continue
        trainer.checkpoints.after_step(trainer.backend.engine)
        save_is_due = trainer.is_due(stage.checkpoints.every_steps)
        if save_is_due or trainer.is_due(stage.validation.every_steps):
            trainer.check_stragglers()
            trainer.validate()
        if save_is_due:
            trainer.save()
        elif (reason := graceful_stop.reason(trainer.needed_to_leave_s)) and trainer.settle():
            trainer.save_unvalidated()
            trainer.checkpoints.finish_save()
            graceful_stop.leave(reason, trainer.state.step)
            break
