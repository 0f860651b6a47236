"""Trains a small model under ZeRO 3 on two ranks, without and with captured layers.

It prints "EQUAL <activation checkpointing> <losses> <graphs>" for each kind of activation checkpointing, and "STILL WRONG" if
DeepSpeed's own linear function gives other losses with selective checkpointing.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.compat.deepspeed import gather_whole_layers
from longhaul.compat.deepspeed_ops import disable_shm_comm
from longhaul.runtime.process_rank import exit_without_cleanup
from longhaul.train.activation_checkpointing import apply_activation_checkpointing
from longhaul.train.batches import MicroBatch
from longhaul.train.compile_layers import compile_layers
from longhaul.train.loss import loss_sum
from tests.parity.parity_cases import MODELS
from tests.support.backward_in_thread import backward_in_thread

STEPS, LENGTH = 3, 32
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


_LINEAR = torch.nn.functional.linear


def losses(checkpointing: str, captures: bool) -> list[float]:
    torch.nn.functional.linear = _LINEAR  # DeepSpeed replaces it for the rest of the process
    (kind, keys), *_ = MODELS["llama"].items()
    config = AutoConfig.for_model(kind, **keys, use_cache=False)
    torch.manual_seed(3)
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    apply_activation_checkpointing(model, checkpointing)
    if captures:
        compile_layers(model, "aot_eager")
    gather_whole_layers(model, [type(layer) for layer in model.model.layers])
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    ids = torch.arange(2, 2 + 2 * LENGTH).view(2, LENGTH) + 7 * dist.get_rank()
    found = []
    for _ in range(STEPS):
        loss = loss_sum(engine, MicroBatch(ids, ids + 1, torch.arange(LENGTH).repeat(2, 1))) / ids.numel()
        backward_in_thread(partial(engine.backward, loss))
        engine.step()
        found.append(loss.item())
    return found


def main() -> None:
    import torch._dynamo

    disable_shm_comm()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    usual = losses("none", captures=False)
    for checkpointing in ("none", "selective", "full"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        # As planning/deepspeed_config.py sets it.
        CONFIG["zero_optimization"]["memory_efficient_linear"] = checkpointing == "none"
        plain, captured = losses(checkpointing, captures=False), losses(checkpointing, captures=True)
        assert plain == captured == usual and plain[-1] < plain[0], (checkpointing, plain, captured, usual)
        if dist.get_rank() == 0:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            print("EQUAL", checkpointing, plain, graphs, flush=True)
    CONFIG["zero_optimization"]["memory_efficient_linear"] = True
    if losses("selective", captures=False) != usual and dist.get_rank() == 0:
        print("STILL WRONG", flush=True)
    dist.barrier()
    sys.stdout.flush()
    exit_without_cleanup()


if __name__ == "__main__":
    main()
