"""The whole tensors of the live model on rank 0, by DeepSpeed's own route and one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from longhaul.checkpoint_io import raw_bytes
from longhaul.checkpoint_io.tensor_parts import Ranges, Shard
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.parallel.slice_model import parameters, saved_buffers

Part = tuple[tuple[int, Ranges], ...]
"""What a rank has of a tensor: (axis, ranges) of every axis that is split; () for the whole."""


def whole_tensors(engine: Any, processes: DistributedContext) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, fp32 master or buffer on the CPU, whether it is a buffer) on rank 0; the others take part and get nothing.

    Raises:
        RuntimeError: parts that should be the same on several ranks differ: a gradient was not summed over them.
    """
    own = {shard.name: (shard, tensor, False) for shard, tensor in parameters(engine.module)}
    own |= {shard.name: (shard, buffer, True) for shard, buffer in saved_buffers(engine.module)}
    everywhere = processes.gather({name: (shard, buffer) for name, (shard, _, buffer) in own.items()})
    digests: dict[str, str] = {}
    for name in dict.fromkeys(name for held in everywhere for name in held):
        holders = _first_holders(name, everywhere)
        value = _master(engine, *own[name][1:]) if name in own else None
        if value is not None and _may_differ(engine, processes, own[name][2]):
            digests[name] = sha256(value)
        if processes.is_main:
            shard, is_buffer = everywhere[next(iter(holders.values()))][name]
            yield name, _collect(shard.shape, value, holders, everywhere, name, processes), is_buffer
        elif value is not None and processes.rank.rank in holders.values():
            dist.send(value.to(processes.device), 0)
    _check_replicas(everywhere, processes.gather(digests))


def _first_holders(name: str, everywhere: list[dict[str, tuple[Shard, bool]]]) -> dict[Part, int]:
    """Each part of a tensor -> the first rank that has it."""
    holders: dict[Part, int] = {}
    for rank, held in enumerate(everywhere):
        if name in held:
            holders.setdefault(_part(held[name][0]), rank)
    return holders


def _part(shard: Shard) -> Part:
    return tuple(sorted(shard.parts.items()))


def _collect(
    shape: tuple[int, ...],
    own: torch.Tensor | None,
    holders: dict[Part, int],
    everywhere: list[dict[str, tuple[Shard, bool]]],
    name: str,
    processes: DistributedContext,
) -> torch.Tensor:
    """Rank 0: the whole tensor from its own part and what the other holders send."""
    if list(holders.values()) == [0] and own is not None:
        return own
    whole = None
    for rank in holders.values():
        shard = everywhere[rank][name][0]
        part = own
        if rank:
            # Parameters' masters and the buffers of mixtures are all fp32.
            part = torch.empty(shard.local_shape, device=processes.device)
            dist.recv(part, rank)
        assert part is not None
        whole = torch.empty(shape) if whole is None else whole
        shard.place(whole, part.cpu())
    assert whole is not None
    return whole


def _master(engine: Any, tensor: Any, is_buffer: bool) -> torch.Tensor:
    """The fp32 master of a parameter, whole over its data ranks, all of which take part; a buffer as it is."""
    from deepspeed.utils import safe_get_full_fp32_param

    if is_buffer or engine.zero_optimization_stage() == 0:
        return tensor.detach().cpu().contiguous()
    master = safe_get_full_fp32_param(tensor)
    if master is None:
        raise RuntimeError(f"DeepSpeed holds no master weights of a parameter of shape {list(tensor.shape)}")
    return master.cpu().contiguous()


def _may_differ(engine: Any, processes: DistributedContext, is_buffer: bool) -> bool:
    """Whether ranks hold the tensor each for itself. What ZeRO gathers from all ranks is the same on each of them."""
    return is_buffer or processes.dims.is_split or engine.zero_optimization_stage() == 0


def sha256(value: torch.Tensor) -> str:
    """Of the bytes of a tensor's elements."""
    return hashlib.sha256(raw_bytes(value)).hexdigest()


def _check_replicas(everywhere: list[dict[str, tuple[Shard, bool]]], digests: list[dict[str, str]]) -> None:
    seen: dict[tuple[str, Part], tuple[int, str]] = {}
    for rank, own in enumerate(digests):
        for name, digest in own.items():
            first, wanted = seen.setdefault((name, _part(everywhere[rank][name][0])), (rank, digest))
            if digest != wanted:
                raise RuntimeError(
                    f"ranks {first} and {rank} hold {name} with different values: a gradient is not summed"
                )
