"""State of one rank that DeepSpeed does not save (`trainer-rank-*.pt`): fp16's loss scaler, PowerSGD."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from longhaul.checkpoint_io.safe_torch_load import load_plain_data
from longhaul.compat.deepspeed import Engine
from longhaul.compat.deepspeed_optimizer_states import loss_scaler_state, restore_loss_scaler


def rank_state_file(checkpoint: Path, rank: int) -> Path:
    """Return the file of a rank's state in a checkpoint."""
    return checkpoint / f"trainer-rank-{rank:05d}.pt"


def rank_state(engine: Engine) -> dict[str, Any]:
    """Return this rank's state for a checkpoint."""
    state: dict[str, Any] = {"loss_scale": loss_scaler_state(engine)}
    if hasattr(engine, "powersgd"):
        state["powersgd"] = engine.powersgd.state()
    return state


def restore_rank_state(engine: Engine, checkpoint: Path, rank: int) -> None:
    """Restore this rank's state from a checkpoint of the same layout."""
    state = _read(checkpoint, rank)
    restore_loss_scaler(engine, state.get("loss_scale"))
    if hasattr(engine, "powersgd"):
        engine.powersgd.load([state["powersgd"]])


def combine_rank_states(engine: Engine, checkpoint: Path, saved_ranks: int) -> None:
    """Restore what does not depend on the layout from a checkpoint of another layout: loss scaler and PowerSGD."""
    states = (_read(checkpoint, rank) for rank in range(saved_ranks))
    first = next(states)
    restore_loss_scaler(engine, first.get("loss_scale"))
    if hasattr(engine, "powersgd"):
        engine.powersgd.load(state["powersgd"] for state in itertools.chain([first], states))


def _read(checkpoint: Path, rank: int) -> dict[str, Any]:
    return load_plain_data(rank_state_file(checkpoint, rank))
