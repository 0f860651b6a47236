"""Opens a DeepSpeed checkpoint folder: chooses the reader for a whole model (zero_checkpoint.py) or a sliced one
(sliced_checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from longhaul.checkpoint_io.lazy_tensors import LazyTensor
from longhaul.checkpoint_io.optimizer_file import MASTER, MOMENTS
from longhaul.checkpoint_io.sliced_checkpoint import (
    SLICE_INDEX,
    open_sliced_tensors,
    sliced_optimizer_steps,
)
from longhaul.checkpoint_io.zero_checkpoint import ZeroCheckpoint
from longhaul.errors import UserError

_SLICED_MODEL_FILES = {
    "mp_rank_01_*": "tensor parallelism",
    "zero_pp_rank_*_mp_rank_01_*": "tensor parallelism",
    "layer_*": "pipeline or expert parallelism",
    "expp_rank_*": "expert parallelism",
}
"""Files that DeepSpeed writes for sliced models only: glob pattern -> the parallelism."""


def open_master_weights(checkpoint_dir: Path) -> Mapping[str, LazyTensor]:
    """Return every parameter and persistent buffer of a checkpoint, by its transformers name.

    checkpoint_dir: the tag folder that save_checkpoint wrote, of any ZeRO stage, number of ranks and precision. Tensor,
    pipeline and expert parallelism need the trainer's slice_index.json.
    Tied parameters appear once, under their first name; the other names are in `aliases`.
    This function reads the headers of the files; the elements are read by the tensor's `read`.

    Raises:
        UserError: a file is missing or damaged, or the checkpoint has an unknown layout.
    """
    with _refuse_unknown_structure(checkpoint_dir):
        if (checkpoint_dir / SLICE_INDEX).exists():
            return open_sliced_tensors(checkpoint_dir, MASTER)
        return _open_zero_checkpoint(checkpoint_dir).master_weights()


@dataclass(frozen=True)
class OptimizerState:
    """Adam's state.

    step:    number of optimizer steps that were taken
    moments: DeepSpeed's name of a moment -> name of a parameter -> tensor; empty before the first step
    """

    step: int
    moments: Mapping[str, Mapping[str, LazyTensor]]


def open_optimizer_state(checkpoint_dir: Path) -> OptimizerState:
    """Return Adam's moments of a checkpoint, by the names that open_master_weights returns; elements are not read.

    Raises:
        UserError: as open_master_weights; or the checkpoint does not name the parameters of the optimizer's state.
    """
    with _refuse_unknown_structure(checkpoint_dir):
        if (checkpoint_dir / SLICE_INDEX).exists():
            step = sliced_optimizer_steps(checkpoint_dir)
            return OptimizerState(
                step, {key: open_sliced_tensors(checkpoint_dir, key) for key in MOMENTS} if step else {}
            )
        checkpoint = _open_zero_checkpoint(checkpoint_dir)
        step = checkpoint.optimizer_steps()
        return OptimizerState(step, {key: checkpoint.moments(key) for key in MOMENTS} if step else {})


def _open_zero_checkpoint(folder: Path) -> ZeroCheckpoint:
    for pattern, parallelism in _SLICED_MODEL_FILES.items():
        if files := sorted(folder.glob(pattern)):
            raise UserError(
                f"{folder} was saved with {parallelism} ({files[0].name}) but has no {SLICE_INDEX}, so it cannot be read",
                "use a checkpoint that longhaul wrote, or one with data parallelism and ZeRO only",
            )
    return ZeroCheckpoint.open(folder)


@contextmanager
def _refuse_unknown_structure(folder: Path) -> Iterator[None]:
    """Turn the errors of a lookup in a file with unexpected content into a UserError."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder} does not have the structure of a DeepSpeed checkpoint: {type(error).__name__}: {error}",
            "the files were altered or another release wrote them: use another checkpoint",
        ) from error
