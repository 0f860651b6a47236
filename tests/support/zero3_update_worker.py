"""Trains a small model in bf16 under ZeRO 3 on two ranks, with DeepSpeed's step and with the update in one pass.

It prints "EQUAL <largest relative difference of losses> <gradient norms>", and "UNCHANGED" if a bad step changes nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.compat.deepspeed import inner_optimizer
from longhaul.compat.deepspeed_ops import disable_shm_comm
from longhaul.compat.deepspeed_optimizer_step import can_update_in_one_pass, update_in_one_pass
from longhaul.runtime.process_rank import exit_without_cleanup
from longhaul.train.adamw_in_one_pass import adamw_in_one_pass
from tests.parity.parity_cases import MODELS

STEPS, LENGTH = 6, 32
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}},
    # Several sub-groups, of which the last parameter of each is padded.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 20_000},
}


class _Run:
    """An engine; `divisor` and `is_bad` are what the update in one pass gets."""

    def __init__(self, in_one_pass: bool) -> None:
        (kind, keys), *_ = MODELS["qwen3"].items()
        config = AutoConfig.for_model(kind, **keys, use_cache=False)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)  # imports the architecture, which must not happen inside zero.Init
        torch.manual_seed(3)
        with deepspeed.zero.Init(config_dict_or_path=CONFIG):
            model: Any = AutoModelForCausalLM.from_config(config)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        self.engine, *_ = deepspeed.initialize(model=model.train(), config=CONFIG)
        self.is_bad = torch.zeros(())
        if in_one_pass:
            assert can_update_in_one_pass(self.engine)
            update_in_one_pass(self.engine, self._update)
            self.engine.optimizer.flatten = None  # gradients are not copied

    def _update(self, group: int, master: torch.Tensor, gradient: torch.Tensor, weights: torch.Tensor) -> None:
        optimizer = inner_optimizer(self.engine)
        settings, state = optimizer.param_groups[group], optimizer.state[master]
        adamw_in_one_pass(settings, state, master, gradient, weights, None, self.is_bad)

    def step(self) -> tuple[float, float]:
        ids = torch.arange(2, 2 + 2 * LENGTH).view(2, LENGTH) + 7 * dist.get_rank()
        loss = self.engine(input_ids=ids, labels=ids).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss.item(), float(self.engine.get_global_grad_norm())

    def masters(self) -> list[torch.Tensor]:
        return [part.detach().clone() for part in self.engine.optimizer.fp32_partitioned_groups_flat]


def main() -> None:
    disable_shm_comm()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    usual, own = _Run(in_one_pass=False), _Run(in_one_pass=True)
    assert len(own.engine.optimizer.fp16_groups) > 2
    expected, found = ([run.step() for _ in range(STEPS)] for run in (usual, own))
    assert found[-1][0] < found[0][0] / 2, found
    differences = [
        abs(a - b) / b for pair, other in zip(found, expected, strict=True) for a, b in zip(pair, other, strict=True)
    ]
    before, own.is_bad = own.masters(), torch.ones(())
    own.step()
    unchanged = all(torch.equal(a, b) for a, b in zip(own.masters(), before, strict=True))
    if dist.get_rank() == 0:
        print("EQUAL", max(differences), found, flush=True)
        print("UNCHANGED" if unchanged else "CHANGED", flush=True)
    dist.barrier()
    sys.stdout.flush()
    exit_without_cleanup()


if __name__ == "__main__":
    main()
