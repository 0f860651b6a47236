"""What DeepSpeed's checkpoint files do not say of a split model, and what its loading leaves undone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from longhaul.artifacts.files import write_json
from longhaul.checkpoint_io.parallel_files import LAYOUT
from longhaul.jobs.specs import TrainSpec
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.slice_model import hugging_face_name, saved_buffers
from longhaul.train.parallel.tensor_slices import shard_of

TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def is_tied(job: TrainSpec) -> bool:
    """Whether the head shares the embedding's weights."""
    return bool(job.model.get("tie_word_embeddings"))


def write_layout(
    engine: Any, dims: ParallelDims, folder: Path, is_tied: bool, gather: Callable[[Any], list[Any]]
) -> list[Path]:
    """Writes layout.json and the buffers of every stage (zero_checkpoint/parallel.py describes both); all ranks call it.

    Returns what this rank wrote.
    """
    written = []
    entries = [entry for part in gather(_entries(engine.module, dims)) for entry in part]
    if dims.rank == 0:
        axes = dims.parallel.model_dump(include={"tensor", "pipeline", "expert"}) | {"data": dims.data}
        write_json(folder / LAYOUT, {"axes": axes, "tied": TIED if is_tied else {}, "entries": entries})
        written.append(folder / LAYOUT)
    if dims.data_rank == dims.tensor_rank == 0:
        buffers = {shard.name: buffer.detach().cpu().contiguous() for shard, buffer in saved_buffers(engine.module)}
        save_file(buffers, _buffers_file(folder, dims))
        written.append(_buffers_file(folder, dims))
    return written


def _entries(module: torch.nn.Module, dims: ParallelDims) -> list[dict[str, Any]]:
    """This rank's parameters: on one data rank, experts on one of each expert rank."""
    found = []
    for local, parameter in module.named_parameters():
        is_expert = hasattr(parameter, "group_name")
        if dims.data_rank >= (dims.parallel.expert if is_expert else 1):
            continue
        shard = shard_of(hugging_face_name(module, local), parameter)
        found.append(
            {
                "model_rank": dims.model_rank,
                "expert_rank": dims.expert_rank if is_expert else None,
                "local": local,
                "name": shard.name,
                "shape": list(shard.shape),
                "parts": [[axis, [list(pair) for pair in ranges]] for axis, ranges in shard.parts.items()],
            }
        )
    return found


def _buffers_file(folder: Path, dims: ParallelDims) -> Path:
    return folder / f"buffers-stage-{dims.stage:02d}.safetensors"


def load_engine(engine: Any, dims: ParallelDims, folder: Path) -> None:
    """Loads a checkpoint of the same layout.

    DeepSpeed saves the experts of the first data rank's expert rank alone with the module; the masters in the optimizer's
    files are complete, so every parameter is taken from them.
    """
    engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=dims.parallel.expert == 1)
    if not dims.is_split:
        return
    if engine.zero_optimization_stage() < 3:
        engine.optimizer.update_lp_params()
    buffers = load_file(_buffers_file(folder, dims))
    for shard, buffer in saved_buffers(engine.module):
        buffer.copy_(buffers[shard.name])
