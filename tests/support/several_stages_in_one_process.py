"""Helpers for ranks that train several stages one after another in the same processes; a user's ranks train one stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deepspeed.comm import comm
from deepspeed.runtime.pipe import p2p
from deepspeed.utils import groups

from longhaul.checks.node_facts import build_ops

MIN_SWAPPED_BYTES = 4096
"""Size of a rank's part of a tensor from which on these tests let DeepSpeed swap it: all but norms and biases of the small
models. DeepSpeed's own threshold is 1 MiB."""


def reset_deepspeed() -> None:
    """Remove the process groups of the previous stage from DeepSpeed's global variables."""
    groups._release_process_group_references(None)
    comm.cdb = None
    p2p._groups = None
    p2p._grid = None


def load_offload_ops(stages: Iterable[dict[str, Any]]) -> None:
    """Load the ops that the offloading of these stage configs needs.

    Loading takes a process seconds. Ranks that are forked afterwards inherit the loaded ops.
    """
    places = {place for stage in stages for place in stage.get("zero", {}).values()}
    ops = ("cpu_adam", "pin_memory", "async_io") if "nvme" in places else ("cpu_adam",) if "cpu" in places else ()
    assert not build_ops(ops, None)["failed"]


def swap_small_tensors() -> None:
    """Let DeepSpeed swap the tensors of small models, with the optimizer states in several sub-groups."""
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

    from longhaul.planning import deepspeed_config

    deepspeed_config.SWAP_SUB_GROUP_ELEMENTS = 20_000
    for swapper_class in (OptimizerSwapper, AsyncPartitionedParameterSwapper):
        _set_min_swapped_bytes(swapper_class)


def _set_min_swapped_bytes(swapper_class: type[Any]) -> None:
    original_init = swapper_class.__init__

    def init(swapper: Any, *arguments: Any, **options: Any) -> None:
        original_init(swapper, *arguments, **options)
        swapper.min_aio_bytes = MIN_SWAPPED_BYTES

    swapper_class.__init__ = init
