"""Trains a small model on one rank under ZeRO 1 and 2, with the trainer's engine and with DeepSpeed's averaging over one rank.

For each stage and precision it prints "<stage> <precision> <EQUAL or DIFFERENT> <copies with averaging> <copies without>":
whether the master weights have the same bits, and how many times gradients were copied into a flat tensor.
"""

from __future__ import annotations

import json
import sys
import tempfile
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.compat.deepspeed_ops import disable_shm_comm
from longhaul.config.stage_config import Parallel, Zero
from longhaul.runtime.process_rank import exit_without_cleanup
from longhaul.train import deepspeed_engine
from tests.parity.parity_cases import MODELS

STEPS, MICRO_BATCHES, LENGTH = 3, 2, 16


def train(stage: int, precision: str, averages: bool) -> tuple[list[torch.Tensor], int]:
    """Return the master weights after the last step, and the number of copies."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "overlap_comm": False, "contiguous_gradients": False},
    }
    (kind, keys), *_ = MODELS["qwen3"].items()
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys, use_cache=False)).train()
    engine = _build_engine(config, model, averages)
    flatten, copies = engine.optimizer.flatten, [0]

    def counted(tensors: Any) -> torch.Tensor:
        copies[0] += 1
        return flatten(tensors)

    engine.optimizer.flatten = counted
    for micro_batch in range(STEPS * MICRO_BATCHES):
        ids = torch.arange(2, 2 + LENGTH).view(1, LENGTH) + micro_batch
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    return [part.detach().clone() for part in engine.optimizer.single_partition_of_fp32_groups], copies[0]


def _build_engine(config: dict[str, Any], model: torch.nn.Module, averages: bool) -> Any:
    """Return the trainer's engine; with `averages`, without the patch."""
    zero = Zero(stage=config["zero_optimization"]["stage"])
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(config))
        file.flush()
        job: Any = SimpleNamespace(deepspeed=file.name, stage=SimpleNamespace(zero=zero, parallel=Parallel()))
        context: Any = SimpleNamespace(swap=None)
        if not averages:
            return deepspeed_engine.build_engine(job, model, context)
        with mock.patch.object(deepspeed_engine, "skip_averaging_over_one_rank"):
            return deepspeed_engine.build_engine(job, model, context)


def main() -> None:
    disable_shm_comm()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for stage in (1, 2):
        for precision in ("bf16", "fp32"):
            (usual, copies), (own, copies_without) = (train(stage, precision, averages) for averages in (True, False))
            is_equal = all(torch.equal(a, b) for a, b in zip(usual, own, strict=True))
            print(stage, precision, "EQUAL" if is_equal else "DIFFERENT", copies, copies_without, flush=True)
    sys.stdout.flush()
    exit_without_cleanup()


if __name__ == "__main__":
    main()
