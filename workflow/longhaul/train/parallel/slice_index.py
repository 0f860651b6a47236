"""Writes slice_index.json and buffers beside a sliced model's checkpoint, and loads that checkpoint in the same layout.

longhaul.checkpoint_io.sliced_checkpoint describes and reads the files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from longhaul.artifacts.atomic_files import write_json
from longhaul.checkpoint_io.safe_torch_load import load_plain_data
from longhaul.checkpoint_io.sliced_checkpoint import BUFFERS_FILE, SLICE_INDEX
from longhaul.compat.deepspeed import Engine, files_read_with
from longhaul.compat.deepspeed_optimizer_states import update_weights_from_masters
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.slice_model import buffer_slices, hugging_face_name
from longhaul.train.parallel.sliced_parameters import slice_of

TIED_WEIGHTS = {"lm_head.weight": "model.embed_tokens.weight"}
"""Name of a tied weight -> the name under which the model stores it."""


def has_tied_embeddings(job: TrainSpec) -> bool:
    """Return True if the head shares the embedding's weights."""
    return bool(job.model.get("tie_word_embeddings"))


def write_slice_index(
    engine: Engine, dims: ParallelDims, folder: Path, is_tied: bool, gather: Callable[[Any], list[Any]]
) -> list[Path]:
    """Write slice_index.json and the buffers of every pipeline rank. All ranks must call it.

    gather: returns the values of all ranks
    Returns the files that this rank wrote.
    """
    written = []
    slices = [entry for of_rank in gather(_index_entries(engine.module, dims)) for entry in of_rank]
    if dims.rank == 0:
        axes = dims.parallel.model_dump(include={"tensor", "pipeline", "expert"}) | {"data": dims.data}
        index = {"axes": axes, "tied": TIED_WEIGHTS if is_tied else {}, "slices": slices}
        write_json(folder / SLICE_INDEX, index)
        written.append(folder / SLICE_INDEX)
    if dims.data_rank == dims.tensor_rank == 0:
        buffers = {
            tensor_slice.name: buffer.detach().cpu().contiguous()
            for tensor_slice, buffer in buffer_slices(engine.module)
        }
        save_file(buffers, _buffers_file(folder, dims))
        written.append(_buffers_file(folder, dims))
    return written


def _index_entries(module: torch.nn.Module, dims: ParallelDims) -> list[dict[str, object]]:
    """Return the index entries of this rank's parameters.

    Data ranks hold equal slices, so only data rank 0 lists them; experts are listed by the first data rank of each expert rank.
    """
    entries = []
    for local_name, parameter in module.named_parameters():
        is_expert = hasattr(parameter, "group_name")
        if dims.data_rank >= (dims.parallel.expert if is_expert else 1):
            continue
        tensor_slice = slice_of(hugging_face_name(module, local_name), parameter)
        entries.append(
            {
                "model_rank": dims.model_rank,
                "expert_rank": dims.expert_rank if is_expert else None,
                "local_name": local_name,
                "name": tensor_slice.name,
                "shape": list(tensor_slice.shape),
                "axis_ranges": [
                    [axis, [list(pair) for pair in ranges]] for axis, ranges in tensor_slice.axis_ranges.items()
                ],
            }
        )
    return entries


def _buffers_file(folder: Path, dims: ParallelDims) -> Path:
    return folder / BUFFERS_FILE.format(dims.pipeline_rank)


def load_engine(engine: Engine, dims: ParallelDims, folder: Path) -> None:
    """Load a checkpoint of the same parallel layout into the engine.

    Of the experts, DeepSpeed saves with the module only those of data rank 0. The master weights in the optimizer's files are
    complete, so every parameter is set from them.
    """
    with files_read_with(engine, load_plain_data):
        engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=dims.parallel.expert == 1)
    if not dims.is_sliced:
        return
    if engine.zero_optimization_stage() < 3:
        update_weights_from_masters(engine)
    buffers = load_file(_buffers_file(folder, dims))
    for tensor_slice, buffer in buffer_slices(engine.module):
        buffer.copy_(buffers[tensor_slice.name])
