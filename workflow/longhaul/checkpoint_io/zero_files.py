"""Where each parameter's master copy and Adam moments lie in a DeepSpeed checkpoint folder, for ZeRO 0 to 3.

The layouts are those of DeepSpeed's own deepspeed/utils/zero_to_fp32.py and runtime/zero/{stage_1_and_2,stage3}.py:

ZeRO 0    mp_rank_00_model_states.pt: the module's own fp32 weights are the masters.
ZeRO 1, 2 zero_pp_rank_<r>_mp_rank_00_optim_states.pt: per parameter group, rank r's share of one flat vector that holds
          the group's parameters in order, each followed by its alignment padding; the vector's end is padding.
ZeRO 3    the same files: per sub-group, rank r's share of every single parameter, ceil(numel / world) elements each, the
          last ranks' padded; frozen parameters lie in rank r's model_states file.

The moments have the places of the masters, in the state of the optimizer that ZeRO wraps. At ZeRO 0 that state counts its
parameters; their names are in `optimizer_parameters`, which the trainer adds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longhaul.checkpoint_io.lazy_tensors import LazyTensor, flat_group, lazy, partitioned, partitioned_group, whole
from longhaul.checkpoint_io.optimizer_state import MASTER, MOMENTS, flat_share, is_zero3, step_of
from longhaul.checkpoint_io.parallel_files import LAYOUT, assembled_step, open_assembled
from longhaul.checkpoint_io.torch_archive import StoredTensor, read_archive
from longhaul.errors import UserError

OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
OTHER_LAYOUTS = {
    "mp_rank_01_*": "tensor parallelism",
    "zero_pp_rank_*_mp_rank_01_*": "tensor parallelism",
    "layer_*": "pipeline parallelism or experts spread over ranks",
    "expp_rank_*": "experts spread over ranks",
}


def open_master_weights(checkpoint_dir: Path) -> Mapping[str, LazyTensor]:
    """Every parameter and persistent buffer of a DeepSpeed checkpoint, by the name the Hugging Face model gives it.

    checkpoint_dir is the tag folder that save_checkpoint wrote, of any ZeRO stage, world size and precision; tensor,
    pipeline and expert parallelism with the trainer's layout.json. Tied parameters appear once, under their first name, the
    others in `aliases`.
    The files' headers are read now, the elements when a LazyTensor is read.

    Raises:
        UserError: a file is missing, damaged, or of a layout that this reader does not know.
    """
    with _as_deepspeed_writes(checkpoint_dir):
        if (checkpoint_dir / LAYOUT).exists():
            return open_assembled(checkpoint_dir)
        model, model_file, states = _read(checkpoint_dir)
        if not states:
            return _unpartitioned(model, model_file)
        find = _zero3 if is_zero3(states[0]) else _zero12
        return _ordered(model, find(model, states, checkpoint_dir), checkpoint_dir)


@dataclass(frozen=True)
class OptimizerState:
    """Adam's state of every parameter: optimizer steps done, and the moments by their DeepSpeed names and the parameter's.

    A state without moments is that of an optimizer before its first step.
    """

    step: int
    moments: Mapping[str, Mapping[str, LazyTensor]]


def open_optimizer_state(checkpoint_dir: Path) -> OptimizerState:
    """Adam's moments of a checkpoint, by the names that open_master_weights gives; nothing is read yet.

    Raises:
        UserError: as open_master_weights; or the checkpoint does not name the parameters of a state.
    """
    with _as_deepspeed_writes(checkpoint_dir):
        if (checkpoint_dir / LAYOUT).exists():
            step, find = assembled_step(checkpoint_dir), lambda key: open_assembled(checkpoint_dir, key)
        else:
            model, model_file, states = _read(checkpoint_dir)
            step = step_of(states[0] if states else model["optimizer"])
            find = lambda key: _moments(model, model_file, states, checkpoint_dir, key)  # noqa: E731
        return OptimizerState(step, {key: find(key) for key in MOMENTS} if step else {})


@contextmanager
def _as_deepspeed_writes(folder: Path) -> Iterator[None]:
    """What is read is looked for where DeepSpeed puts it; a file that holds anything else there is named as what it is."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder} is not laid out as DeepSpeed writes checkpoints: {type(error).__name__}: {error}",
            "the files were altered or written by another release: use another checkpoint",
        ) from error


def _read(folder: Path) -> tuple[dict[str, Any], Path, list[dict[str, Any]]]:
    """The model file's content, its path, and what each rank's optimizer file holds; of ZeRO 0, none."""
    _refuse_other_layouts(folder)
    partitioned = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    model_file = partitioned if partitioned.exists() else folder / "mp_rank_00_model_states.pt"
    model = read_archive(model_file)
    states = [read_archive(path)["optimizer_state_dict"] for path in _optimizer_files(folder)]
    if states:
        _check_partition_count(states[0], len(states), folder)
    return model, model_file, states


def _moments(
    model: dict[str, Any], model_file: Path, states: list[dict[str, Any]], folder: Path, key: str
) -> dict[str, LazyTensor]:
    if not states:
        return _unpartitioned_moments(model, model_file, key)
    find = _zero3_trained if is_zero3(states[0]) else _zero12_trained
    return find(model, states, folder, key)


def _unpartitioned_moments(model: dict[str, Any], path: Path, key: str) -> dict[str, LazyTensor]:
    names, state = model.get("optimizer_parameters"), model["optimizer"]["state"]
    if names is None or len(names) != len(state):
        raise UserError(
            f"{path} does not name the parameters of its optimizer's state",
            "it was not written by this trainer: go on in the layout it was saved with",
        )
    return {name: lazy(state[index][key].shape, (whole(state[index][key]),)) for index, name in enumerate(names)}


def _refuse_other_layouts(folder: Path) -> None:
    for pattern, layout in OTHER_LAYOUTS.items():
        if found := sorted(folder.glob(pattern)):
            raise UserError(
                f"{folder} was saved with {layout} ({found[0].name}) and lacks {LAYOUT}, so it cannot be read",
                "use a checkpoint that longhaul wrote, or one with data parallelism and ZeRO only",
            )


def _optimizer_files(folder: Path) -> list[Path]:
    ranks = {int(match[1]): path for path in folder.iterdir() if (match := OPTIMIZER_FILE.fullmatch(path.name))}
    if sorted(ranks) != list(range(len(ranks))):
        raise UserError(
            f"{folder} holds optimizer files of ranks {sorted(ranks)}: some are missing", "use another checkpoint"
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _check_partition_count(state: dict[str, Any], files: int, folder: Path) -> None:
    counts = state["partition_count"]
    counts = set(counts) if isinstance(counts, list) else {counts}
    if counts != {files}:
        raise UserError(
            f"{folder} was saved by {sorted(counts)} data-parallel ranks but holds {files} optimizer files",
            "a rank did not finish its save, or two saves share the folder: use another checkpoint",
        )


def _unpartitioned(model: dict[str, Any], path: Path) -> dict[str, LazyTensor]:
    """ZeRO 0: names that share a storage are tied."""
    tensors: dict[StoredTensor, str] = {}
    found: dict[str, LazyTensor] = {}
    for name, stored in _module_tensors(model, path).items():
        if stored.dtype.is_floating_point and stored.dtype.itemsize != 4:
            raise UserError(
                f"{path} holds {stored.dtype} weights ({name}) and no fp32 master copy",
                "train with ZeRO stage 1 or higher",
            )
        first = tensors.setdefault(stored, name)
        if first == name:
            found[name] = lazy(stored.shape, (whole(stored),))
        else:
            found[first] = replace(found[first], aliases=(*found[first].aliases, name))
    return found


def _module_tensors(model: dict[str, Any], path: Path) -> dict[str, StoredTensor]:
    tensors = model["module"]
    for name, stored in tensors.items():
        if not isinstance(stored, StoredTensor):
            raise UserError(f"{path}: {name} is not a contiguous tensor", "only plain tensors can be exported")
    return tensors


def _zero12(model: dict[str, Any], states: list[dict[str, Any]], folder: Path) -> dict[str, LazyTensor]:
    masters = _zero12_trained(model, states, folder, MASTER)
    # What the optimizer does not own (frozen weights) lies in the module as it is.
    path = folder / "mp_rank_00_model_states.pt"
    aliases = model["shared_params"]
    for name, stored in _module_tensors(model, path).items():
        if name not in masters and name not in aliases:
            masters[name] = lazy(stored.shape, (whole(stored),))
    return masters


def _zero12_trained(
    model: dict[str, Any], states: list[dict[str, Any]], folder: Path, key: str
) -> dict[str, LazyTensor]:
    found: dict[str, LazyTensor] = {}
    paddings = states[0].get("param_alignment_paddings")
    for group, shapes in enumerate(model["param_shapes"]):
        flat = [whole(flat_share(state, group, key)) for state in states]
        gaps = paddings[group] if paddings else [0] * len(shapes)
        found |= flat_group(shapes, gaps, flat, folder)
    return found


def _zero3(model: dict[str, Any], states: list[dict[str, Any]], folder: Path) -> dict[str, LazyTensor]:
    masters = _zero3_trained(model, states, folder, MASTER)
    return masters | _zero3_frozen(model, len(states), folder) | _buffers(model)


def _zero3_trained(
    model: dict[str, Any], states: list[dict[str, Any]], folder: Path, key: str
) -> dict[str, LazyTensor]:
    found: dict[str, LazyTensor] = {}
    for group, shapes in enumerate(model["param_shapes"]):
        found |= partitioned_group(shapes, [whole(flat_share(state, group, key)) for state in states], folder)
    return found


def _zero3_frozen(model: dict[str, Any], world_size: int, folder: Path) -> dict[str, LazyTensor]:
    shapes = model["frozen_param_shapes"] or {}
    if not shapes:
        return {}
    files = [folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world_size)]
    fragments = [read_archive(path)["frozen_param_fragments"] for path in files]
    return {
        name: partitioned(shape, [whole(fragment[name]) for fragment in fragments], 0) for name, shape in shapes.items()
    }


def _buffers(model: dict[str, Any]) -> dict[str, LazyTensor]:
    tensors = model["module"]
    return {name: lazy(tensors[name].shape, (whole(tensors[name]),)) for name in model["buffer_names"]}


def _ordered(model: dict[str, Any], masters: dict[str, LazyTensor], folder: Path) -> dict[str, LazyTensor]:
    """The masters in the module's order, each with its aliases."""
    shared: dict[str, str] = model["shared_params"]
    found = {name: masters[name] for name in model["module"] if name in masters}
    if missing := set(model["module"]) - set(found) - set(shared):
        raise UserError(f"{folder} holds no master copy of {sorted(missing)[0]}", "use another checkpoint")
    for alias, name in shared.items():
        if name not in found:
            raise UserError(f"{folder}: {alias} is tied to {name}, which has no master copy", "use another checkpoint")
        found[name] = replace(found[name], aliases=(*found[name].aliases, alias))
    return found
