"""Gathers whole tensors of the live model on rank 0 for reference values, and checks that replicas are equal.

DeepSpeed's own functions gather what ZeRO partitions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from longhaul.checkpoint_io import raw_bytes
from longhaul.checkpoint_io.tensor_slice import Ranges, TensorSlice
from longhaul.compat.deepspeed import Engine
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.parallel.slice_model import buffer_slices, parameter_slices

SlicePosition = tuple[tuple[int, Ranges], ...]
"""The position of a slice in its tensor: (axis, ranges) of every sliced axis; () for the whole tensor."""

Held = dict[str, tuple[TensorSlice, bool]]
"""The tensors of one rank: name -> (slice, True for a buffer)."""


def gather_whole_tensors(engine: Engine, context: DistributedContext) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield (name, fp32 master weight or buffer on the CPU, True for a buffer) on rank 0.

    All ranks must iterate; ranks other than 0 send their slices and get no items.

    Raises:
        RuntimeError: ranks hold different values of the same slice: a gradient was not summed over them, or kernels differ.
    """
    own = {tensor_slice.name: (tensor_slice, tensor, False) for tensor_slice, tensor in parameter_slices(engine.module)}
    own |= {tensor_slice.name: (tensor_slice, buffer, True) for tensor_slice, buffer in buffer_slices(engine.module)}
    held_by_rank = context.gather(
        {name: (tensor_slice, is_buffer) for name, (tensor_slice, _, is_buffer) in own.items()}
    )
    digests: dict[str, str] = {}
    for name in dict.fromkeys(name for held in held_by_rank for name in held):
        senders = _first_holders(name, held_by_rank)
        value = _master_weight(engine, *own[name][1:]) if name in own else None
        if value is not None and _is_replicated(engine, context, own[name][2]):
            digests[name] = tensor_sha256(value)
        if context.is_main:
            tensor_slice, is_buffer = held_by_rank[next(iter(senders.values()))][name]
            yield name, _receive_whole(tensor_slice.shape, value, senders, held_by_rank, name, context), is_buffer
        elif value is not None and context.rank.rank in senders.values():
            dist.send(value.to(context.device), 0)
    _check_replicas(held_by_rank, context.gather(digests))


def _first_holders(name: str, held_by_rank: list[Held]) -> dict[SlicePosition, int]:
    """Return each slice of a tensor -> the first rank that holds it."""
    holders: dict[SlicePosition, int] = {}
    for rank, held in enumerate(held_by_rank):
        if name in held:
            holders.setdefault(_position(held[name][0]), rank)
    return holders


def _position(tensor_slice: TensorSlice) -> SlicePosition:
    return tuple(sorted(tensor_slice.axis_ranges.items()))


def _receive_whole(
    shape: tuple[int, ...],
    own: torch.Tensor | None,
    senders: dict[SlicePosition, int],
    held_by_rank: list[Held],
    name: str,
    context: DistributedContext,
) -> torch.Tensor:
    """Return, on rank 0, the whole tensor from its own slice and those that the senders send."""
    if list(senders.values()) == [0] and own is not None:
        return own
    whole = None
    for rank in senders.values():
        tensor_slice = held_by_rank[rank][name][0]
        local = own
        if rank:
            # Master weights and the persistent buffers of the supported architectures are all fp32.
            local = torch.empty(tensor_slice.local_shape, device=context.device)
            dist.recv(local, rank)
        assert local is not None
        whole = torch.empty(shape) if whole is None else whole
        tensor_slice.insert(whole, local.cpu())
    assert whole is not None
    return whole


def _master_weight(engine: Engine, tensor: torch.Tensor, is_buffer: bool) -> torch.Tensor:
    """Return the fp32 master weight of a parameter, gathered over its data ranks (all must call), or a buffer unchanged."""
    from deepspeed.utils import safe_get_full_fp32_param

    if is_buffer or engine.zero_optimization_stage() == 0:
        return tensor.detach().cpu().contiguous()
    master = safe_get_full_fp32_param(tensor)
    if master is None:
        raise RuntimeError(f"DeepSpeed has no master weights of a parameter of shape {list(tensor.shape)}")
    return master.cpu().contiguous()


def _is_replicated(engine: Engine, context: DistributedContext, is_buffer: bool) -> bool:
    """Return True if ranks hold independent copies of the tensor, which may differ.

    ZeRO gathers one value for all ranks; hashing it on each of them would take longer than gathering it.
    """
    return is_buffer or context.dims.is_sliced or engine.zero_optimization_stage() == 0


def tensor_sha256(value: torch.Tensor) -> str:
    """Return the SHA-256 of the bytes of a tensor's elements."""
    return hashlib.sha256(raw_bytes(value)).hexdigest()


def _check_replicas(held_by_rank: list[Held], digests_by_rank: list[dict[str, str]]) -> None:
    first: dict[tuple[str, SlicePosition], tuple[int, str]] = {}
    for rank, digests in enumerate(digests_by_rank):
        for name, digest in digests.items():
            first_rank, expected = first.setdefault((name, _position(held_by_rank[rank][name][0])), (rank, digest))
            if digest != expected:
                raise RuntimeError(
                    f"ranks {first_rank} and {rank} hold different values of {name}: its gradient was not summed over them,"
                    " or their kernels added in different orders"
                )
