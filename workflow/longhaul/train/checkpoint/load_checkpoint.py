"""Loads one complete checkpoint into DeepSpeed's engine, and checks that it belongs to this weights folder."""

from __future__ import annotations

from pathlib import Path

from longhaul.artifacts.typed_json import read_typed_json
from longhaul.compat.deepspeed import Engine
from longhaul.compat.deepspeed_optimizer_states import replay_cpu_adam_steps
from longhaul.errors import UserError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint.checkpoint_folders import read_manifest
from longhaul.train.checkpoint.extra_rank_state import combine_rank_states, restore_rank_state
from longhaul.train.checkpoint.resharding import load_resharded
from longhaul.train.checkpoint.saved_layout import Layout, layout_of, planned_layout
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.parallel.slice_index import load_engine

TRAINING_STATE = "training_state.json"


def load_checkpoint(
    engine: Engine, job: TrainSpec, folder: Path, context: DistributedContext
) -> tuple[TrainingState, Layout]:
    """Load weights, optimizer and rank state. Return the training state, and the layout with which it was saved.

    A checkpoint of another layout is resharded. Every rank calls this.

    Raises:
        UserError: the checkpoint does not have the model's tensors.
    """
    state, saved = (
        read_typed_json(folder / TRAINING_STATE, TrainingState, "use another checkpoint"),
        layout_of(read_manifest(folder)),
    )
    is_same_layout = saved == planned_layout(job)
    # DeepSpeed's own load loses a part of what is offloaded to a disk, and would hold all of it in memory at once.
    if is_same_layout and not job.stage.zero.nvme_keys:
        load_engine(engine, context.dims, folder)
    else:
        load_resharded(engine, folder)
        engine.global_steps = state.step
        engine.global_samples = state.step * job.stage.global_batch_size
    replay_cpu_adam_steps(engine)
    if is_same_layout:
        restore_rank_state(engine, folder, context.rank.rank)
    else:
        combine_rank_states(engine, folder, saved["world_size"])
    return state, saved


def check_belongs_to(weights: Path, folder: Path) -> None:
    """Raise UserError unless the checkpoint was saved for this weights folder."""
    owner = read_manifest(folder).get("weights", weights.name)
    if owner != weights.name:
        raise UserError(
            f"{folder} belongs to the weights {owner}, not to {weights.name}: another model, data or settings",
            f"move it back to …/{owner}/checkpoints",
        )
