"""Computes the gradients of one masked global batch under several micro batch sizes; rank 0 saves them.

Argument: the folder for the results.
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
import transformers
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

from longhaul.compat.deepspeed_ops import disable_shm_comm
from longhaul.data.sampling.sample_format import IGNORED_LABEL
from longhaul.runtime.process_rank import exit_without_cleanup
from longhaul.train.batches import MicroBatch
from longhaul.train.loss import loss_sum, scale_to_global_mean

GLOBAL_BATCH, LENGTH, VOCABULARY = 16, 24, 96


def batch() -> MicroBatch:
    """Return sequences with very different numbers of loss tokens; one of them has none."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
    labels = ids[:, 1:].clone()
    for row in range(GLOBAL_BATCH):
        labels[row, : min(LENGTH, 2 * row)] = IGNORED_LABEL
    labels[3] = IGNORED_LABEL
    return MicroBatch(ids[:, :-1], labels, torch.arange(LENGTH).repeat(GLOBAL_BATCH, 1))


def gradients(micro: int, zero_stage: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ranks = torch.distributed.get_world_size()
    accumulation = GLOBAL_BATCH // ranks // micro
    ds_config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
        "zero_optimization": {"stage": zero_stage},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=ds_config)
    whole = batch()
    rows = torch.arange(GLOBAL_BATCH).reshape(accumulation, ranks, micro)[:, torch.distributed.get_rank()]
    for chosen in rows:
        part = MicroBatch(*(getattr(whole, name)[chosen] for name in ("input_ids", "labels", "position_ids")))
        engine.backward(
            scale_to_global_mean(loss_sum(engine, part), torch.tensor(whole.loss_tokens), ranks, accumulation)
        )
        if engine.is_gradient_accumulation_boundary():
            found = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
        engine.step()
    return found


def main() -> None:
    disable_shm_comm()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    out, ranks = Path(sys.argv[1]), torch.distributed.get_world_size()
    for micro in (1, 2, 4):
        for zero_stage in (0, 1) if micro == 2 else (0,):
            found = gradients(micro, zero_stage)
            if torch.distributed.get_rank() == 0:
                save_file(found, out / f"ranks{ranks}-micro{micro}-zero{zero_stage}.safetensors")
    torch.distributed.barrier()
    exit_without_cleanup()


if __name__ == "__main__":
    main()
