"""Saves and resumes a small engine in fp16 and bf16 at every ZeRO stage; prints a line for each that has its values again.

On one process. DeepSpeed refuses fp16 on CPUs for its speed alone.
"""

from __future__ import annotations

import os
import tempfile

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from longhaul.checkpoint_io.safe_torch_load import load_plain_data
from longhaul.compat.deepspeed import files_read_with
from longhaul.compat.deepspeed_ops import disable_shm_comm

STEPS = 3
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def resume(zero_stage: int, precision: str) -> bool:
    """Train, save, train on, and load the save. Return whether weights and loss scale are those of the save."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    settings = {"enabled": True, **({"initial_scale_power": 4} if precision == "fp16" else {})}
    config = {"train_batch_size": 2, "zero_optimization": {"stage": zero_stage}, precision: settings}
    config["zero_allow_untested_optimizer"] = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    train(engine, TYPES[precision])
    with tempfile.TemporaryDirectory() as folder:
        saved = state(engine)
        engine.save_checkpoint(folder, tag="saved")
        train(engine, TYPES[precision])
        assert state(engine) != saved
        with files_read_with(engine, load_plain_data):
            path, _ = engine.load_checkpoint(folder, tag="saved")
    return path is not None and state(engine) == saved


def train(engine: deepspeed.DeepSpeedEngine, dtype: torch.dtype) -> None:
    for _ in range(STEPS):
        engine.backward(engine(torch.ones(2, 8, dtype=dtype)).float().pow(2).mean())
        engine.step()


def state(engine: deepspeed.DeepSpeedEngine) -> list[object]:
    scale = getattr(engine.optimizer, "cur_scale", None)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return [scale, *(parameter.tolist() for parameter in engine.module.parameters())]


def main() -> None:
    get_accelerator().is_fp16_supported = lambda: True
    disable_shm_comm()
    deepspeed.init_distributed("gloo", verbose=False)
    for zero_stage in range(4):
        for precision in TYPES:
            print(f"RESUMED {zero_stage} {precision}: {resume(zero_stage, precision)}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
