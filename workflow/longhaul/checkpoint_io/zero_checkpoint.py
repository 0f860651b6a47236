"""Finds a whole model's tensors in DeepSpeed's files, for ZeRO 0 to 3 (names, frozen weights, buffers); zero_partitions.py
computes offsets.

The layout is that of deepspeed/utils/zero_to_fp32.py and deepspeed/runtime/zero/{stage_1_and_2,stage3}.py:

ZeRO 0    mp_rank_00_model_states.pt: the fp32 weights of the module are the master weights.
ZeRO 1, 2 zero_pp_rank_<r>_mp_rank_00_optim_states.pt: for each parameter group, rank r's partition of one flat vector. The
          vector holds the parameters of the group in order, each followed by alignment padding; it ends in padding.
ZeRO 3    the same files: for each sub-group, rank r's partition of every parameter, ceil(numel / ranks) elements each; the
          partitions of the last ranks end in padding. Frozen parameters are in rank r's model_states file.

The moments have the positions of the master weights, in the state of the optimizer that ZeRO wraps. At ZeRO 0 that state
numbers its parameters; the trainer adds their names as `optimizer_parameters`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longhaul.checkpoint_io.lazy_tensors import LazyTensor, element_range_of, lazy_stored_tensor
from longhaul.checkpoint_io.optimizer_file import MASTER, flat_partition, is_zero3, optimizer_steps
from longhaul.checkpoint_io.torch_archive import StoredTensor, read_archive
from longhaul.checkpoint_io.zero_partitions import (
    partitioned_tensor,
    tensors_of_flat_group,
    tensors_of_partitioned_group,
)
from longhaul.errors import UserError

OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


@dataclass(frozen=True)
class ZeroCheckpoint:
    """The content of a checkpoint's files; tensors are not read.

    model:      content of rank 0's model_states file `model_file`
    optimizers: rank -> content of its optim_states file; empty for ZeRO 0
    """

    folder: Path
    model_file: Path
    model: dict[str, Any]
    optimizers: list[dict[str, Any]]

    @staticmethod
    def open(folder: Path) -> ZeroCheckpoint:
        """Read the files' headers; UserError if a file is missing or damaged."""
        zero3_file = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
        model_file = zero3_file if zero3_file.exists() else folder / "mp_rank_00_model_states.pt"
        model = read_archive(model_file)
        optimizers = [read_archive(path)["optimizer_state_dict"] for path in _optimizer_files(folder)]
        if optimizers:
            _check_partition_count(optimizers[0], len(optimizers), folder)
        return ZeroCheckpoint(folder, model_file, model, optimizers)

    def master_weights(self) -> dict[str, LazyTensor]:
        """Return every parameter and persistent buffer by name, in the module's order; tied ones once, with aliases."""
        if not self.optimizers:
            return self._zero0_weights()
        if is_zero3(self.optimizers[0]):
            masters = self._zero3_group_tensors(MASTER) | self._zero3_frozen_weights() | self._zero3_buffers()
        else:
            masters = self._zero12_weights()
        return self._in_module_order(masters)

    def moments(self, key: str) -> dict[str, LazyTensor]:
        """Return the moment `key` of every trained parameter by name."""
        if not self.optimizers:
            return self._zero0_moments(key)
        return self._zero3_group_tensors(key) if is_zero3(self.optimizers[0]) else self._zero12_group_tensors(key)

    def optimizer_steps(self) -> int:
        """Return the number of optimizer steps."""
        return optimizer_steps(self.optimizers[0] if self.optimizers else self.model["optimizer"])

    def _module_tensors(self) -> dict[str, StoredTensor]:
        tensors = self.model["module"]
        for name, stored in tensors.items():
            if not isinstance(stored, StoredTensor):
                raise UserError(
                    f"{self.model_file}: {name} is not a contiguous tensor; no other can be exported",
                    "use another checkpoint",
                )
        return tensors

    def _zero0_weights(self) -> dict[str, LazyTensor]:
        """Names that share a storage are tied."""
        first_names: dict[StoredTensor, str] = {}
        weights: dict[str, LazyTensor] = {}
        for name, stored in self._module_tensors().items():
            if stored.dtype.is_floating_point and stored.dtype.itemsize != 4:
                raise UserError(
                    f"{self.model_file} holds {stored.dtype} weights ({name}) and no fp32 master weights",
                    "train with ZeRO stage 1 or higher",
                )
            first = first_names.setdefault(stored, name)
            if first == name:
                weights[name] = lazy_stored_tensor(stored)
            else:
                weights[first] = replace(weights[first], aliases=(*weights[first].aliases, name))
        return weights

    def _zero0_moments(self, key: str) -> dict[str, LazyTensor]:
        names, state = self.model.get("optimizer_parameters"), self.model["optimizer"]["state"]
        if names is None or len(names) != len(state):
            raise UserError(
                f"{self.model_file} does not name the parameters of its optimizer state (optimizer_parameters)",
                "another program wrote it: resume with the parallel layout that saved it",
            )
        return {name: lazy_stored_tensor(state[index][key]) for index, name in enumerate(names)}

    def _zero12_weights(self) -> dict[str, LazyTensor]:
        masters = self._zero12_group_tensors(MASTER)
        # The optimizer has no frozen weights; the module's own copy is the only one.
        aliases = self.model["shared_params"]
        for name, stored in self._module_tensors().items():
            if name not in masters and name not in aliases:
                masters[name] = lazy_stored_tensor(stored)
        return masters

    def _zero12_group_tensors(self, key: str) -> dict[str, LazyTensor]:
        tensors: dict[str, LazyTensor] = {}
        paddings = self.optimizers[0].get("param_alignment_paddings")
        for group, shapes in enumerate(self.model["param_shapes"]):
            partitions = [element_range_of(flat_partition(state, group, key)) for state in self.optimizers]
            tensors |= tensors_of_flat_group(
                shapes, paddings[group] if paddings else [0] * len(shapes), partitions, self.folder
            )
        return tensors

    def _zero3_group_tensors(self, key: str) -> dict[str, LazyTensor]:
        tensors: dict[str, LazyTensor] = {}
        for group, shapes in enumerate(self.model["param_shapes"]):
            partitions = [element_range_of(flat_partition(state, group, key)) for state in self.optimizers]
            tensors |= tensors_of_partitioned_group(shapes, partitions, self.folder)
        return tensors

    def _zero3_frozen_weights(self) -> dict[str, LazyTensor]:
        shapes = self.model["frozen_param_shapes"] or {}
        if not shapes:
            return {}
        files = [
            self.folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(len(self.optimizers))
        ]
        fragments = [read_archive(path)["frozen_param_fragments"] for path in files]
        return {
            name: partitioned_tensor(shape, [element_range_of(fragment[name]) for fragment in fragments], 0)
            for name, shape in shapes.items()
        }

    def _zero3_buffers(self) -> dict[str, LazyTensor]:
        return {name: lazy_stored_tensor(self.model["module"][name]) for name in self.model["buffer_names"]}

    def _in_module_order(self, masters: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        shared: dict[str, str] = self.model["shared_params"]
        ordered = {name: masters[name] for name in self.model["module"] if name in masters}
        if missing := set(self.model["module"]) - set(ordered) - set(shared):
            raise UserError(f"{self.folder} has no master weights of {sorted(missing)[0]}", "use another checkpoint")
        for alias, name in shared.items():
            if name not in ordered:
                raise UserError(
                    f"{self.folder}: {alias} is tied to {name}, which has no master weights", "use another checkpoint"
                )
            ordered[name] = replace(ordered[name], aliases=(*ordered[name].aliases, alias))
        return ordered


def _optimizer_files(folder: Path) -> list[Path]:
    ranks = {int(match[1]): path for path in folder.iterdir() if (match := OPTIMIZER_FILE.fullmatch(path.name))}
    if sorted(ranks) != list(range(len(ranks))):
        raise UserError(
            f"{folder} holds optimizer files of ranks {sorted(ranks)} only: some are missing", "use another checkpoint"
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _check_partition_count(optimizer: dict[str, Any], files: int, folder: Path) -> None:
    counts = optimizer["partition_count"]
    counts = set(counts) if isinstance(counts, list) else {counts}
    if counts != {files}:
        raise UserError(
            f"{folder} was saved by {sorted(counts)} data-parallel ranks but holds {files} optimizer files",
            "a rank did not finish its save, or two saves share the folder: use another checkpoint",
        )
