"""Builds a stage's model from a pretrained folder on every rank, as training does, and compares it with given tensors.

Arguments: the stage's payload, a safetensors file of the tensors. Each rank prints the bytes it read of the folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import load_file

from longhaul.artifacts import TokenizerManifest
from longhaul.jobs import StageJob
from longhaul.ranks import leave
from longhaul.train.model import build_model
from longhaul.train.parallel.split import parameters, saved_buffers
from longhaul.train.processes import start_processes


def main() -> None:
    job, wanted = StageJob.read(Path(sys.argv[1])), load_file(sys.argv[2])
    tokenizer = TokenizerManifest("", "", 300, 0, 1, 2, False)
    read = 0
    original = os.preadv

    def counted(*arguments):
        nonlocal read
        done = original(*arguments)
        read += done
        return done

    os.preadv = counted
    with start_processes(job) as processes:
        model = build_model(job, tokenizer, None, processes)
        for shard, tensor in [*parameters(model), *saved_buffers(model)]:
            partitioned = hasattr(tensor, "ds_id")
            if partitioned:
                assert tensor.ds_tensor.numel() <= -(-shard.numel // processes.rank.world_size), shard.name
            with deepspeed.zero.GatheredParameters([tensor], enabled=partitioned):
                assert tensor.shape == shard.local_shape, shard.name
                assert torch.equal(tensor, shard.cut(wanted[shard.name])), shard.name
        print(f"rank {processes.rank.rank} read {read}", flush=True)
        processes.barrier()
    leave()


if __name__ == "__main__":
    main()
