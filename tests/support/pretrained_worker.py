"""Builds a stage's model from a pretrained folder on every rank, as training does, and compares it with given tensors.

Arguments: the stage's payload, a safetensors file of the tensors. Each rank prints the bytes it read of the folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from longhaul.artifacts.schemas import TokenizerManifest
from longhaul.jobs.specs import TrainSpec
from longhaul.runtime.rank import leave
from longhaul.train.build_model import build_model
from longhaul.train.distributed_context import distributed_context
from longhaul.train.parallel.slice_model import parameters, saved_buffers
from longhaul.train.parallel.tensor_slices import decoder_layers


def assert_no_experts_are_kept(model: Any) -> None:
    """Of their gathered weights, which ZeRO-3 lets go after a forward pass, autograd holds none until the backward one."""
    mixtures = [layer.mlp.experts for layer in decoder_layers(model) if hasattr(layer.mlp, "experts")]
    kept = set()
    with (
        deepspeed.zero.GatheredParameters(list(model.parameters())),
        saved_tensors_hooks(lambda tensor: kept.add(tensor.untyped_storage().data_ptr()) or tensor, lambda own: own),
    ):
        experts = {weight.untyped_storage().data_ptr() for mixture in mixtures for weight in mixture.parameters()}
        model(input_ids=torch.arange(2, 18)[None])
    assert kept and experts and not kept & experts


def main() -> None:
    job, wanted = TrainSpec.read(Path(sys.argv[1])), load_file(sys.argv[2])
    tokenizer = TokenizerManifest("", "", 300, 0, 1, 2, False)
    read = 0
    original = os.preadv

    def counted(*arguments):
        nonlocal read
        done = original(*arguments)
        read += done
        return done

    os.preadv = counted
    with distributed_context(job) as processes:
        model = build_model(job, tokenizer, None, processes)
        for shard, tensor in [*parameters(model), *saved_buffers(model)]:
            partitioned = hasattr(tensor, "ds_id")
            if partitioned:
                assert tensor.ds_tensor.numel() <= -(-shard.numel // processes.rank.world_size), shard.name
            with deepspeed.zero.GatheredParameters([tensor], enabled=partitioned):
                assert tensor.shape == shard.local_shape, shard.name
                assert torch.equal(tensor, shard.cut(wanted[shard.name])), shard.name
        print(f"rank {processes.rank.rank} read {read}", flush=True)
        if job.stage.zero.stage == 3:
            assert_no_experts_are_kept(model)
        processes.barrier()
    leave()


if __name__ == "__main__":
    main()
