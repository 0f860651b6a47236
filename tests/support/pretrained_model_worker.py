"""Builds a stage's model from a pretrained folder on every rank, as training does, and compares it with given tensors.

Arguments: the training job's spec, a safetensors file of the expected tensors. Each rank prints how many bytes it read.
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

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.runtime.process_rank import exit_without_cleanup
from longhaul.train.build_model import build_model
from longhaul.train.distributed_context import distributed_context
from longhaul.train.parallel.slice_model import buffer_slices, parameter_slices
from longhaul.train.parallel.sliced_parameters import decoder_layers


def assert_no_experts_are_kept(model: Any) -> None:
    """Assert that autograd keeps no gathered expert weights: ZeRO 3 releases them after the forward pass."""
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
    job, expected = TrainSpec.read(Path(sys.argv[1])), load_file(sys.argv[2])
    tokenizer = TokenizerManifest("", "", 300, 0, 1, 2, False, {})
    read = 0
    original = os.preadv

    def counted(*arguments):
        nonlocal read
        done = original(*arguments)
        read += done
        return done

    os.preadv = counted
    with distributed_context(job) as context:
        model = build_model(job, tokenizer, None, context)
        for tensor_slice, tensor in [*parameter_slices(model), *buffer_slices(model)]:
            partitioned = hasattr(tensor, "ds_id")
            if partitioned:
                assert tensor.ds_tensor.numel() <= -(-tensor_slice.numel // context.rank.world_size), tensor_slice.name
            with deepspeed.zero.GatheredParameters([tensor], enabled=partitioned):
                assert tensor.shape == tensor_slice.local_shape, tensor_slice.name
                assert torch.equal(tensor, tensor_slice.extract(expected[tensor_slice.name])), tensor_slice.name
        print(f"rank {context.rank.rank} read {read}", flush=True)
        if job.stage.zero.stage == 3:
            assert_no_experts_are_kept(model)
        context.barrier()
    exit_without_cleanup()


if __name__ == "__main__":
    main()
