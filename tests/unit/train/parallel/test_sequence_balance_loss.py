"""The balance loss of each sequence: its value and gradient by its formula, once a step, and only while the model trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longhaul.config.run_config import Parallel
from longhaul.train.activation_checkpointing import recompute_layers
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.sequence_balance_loss import SequenceBalance
from tests.support.small_configs import LLAMA

WEIGHT, BATCH, LENGTH = 0.5, 3, 16
MIXTURE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
TWINS: dict[str, dict[str, Any]] = {"qwen3_moe": {"num_experts": 4, "head_dim": 16}, "deepseek_v3": LATENT}


def build(twin: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(twin, **{**LLAMA, **MIXTURE, **TWINS[twin]}, use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()


def balance(model: Any, weight: float = WEIGHT, ranks: int = 1) -> SequenceBalance:
    stage = SimpleNamespace(sequence_aux_loss_coef=weight, sequence_length=LENGTH, global_batch_size=BATCH)
    job: Any = SimpleNamespace(stage=stage)
    return SequenceBalance(model, ParallelDims(0, ranks, Parallel()), job)


def loss(model: Any) -> torch.Tensor:
    ids = torch.randint(400, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    return model(input_ids=ids, labels=ids).loss


def by_the_formula(model: Any) -> torch.Tensor:
    """Loss of the tokens plus WEIGHT times the sum over layers of the mean over sequences."""
    routed: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
    gates = [
        layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts")
    ]
    hooks = [gate.register_forward_hook(lambda g, _, out: routed.append((g, out[0], out[2]))) for gate in gates]
    total = loss(model)
    for hook in hooks:
        hook.remove()
    assert routed
    for gate, logits, chosen in routed:
        scores = logits.sigmoid() if hasattr(gate, "e_score_correction_bias") else logits.softmax(-1)
        scores = (scores / scores.sum(-1, keepdim=True)).view(BATCH, LENGTH, 4)
        for sequence in range(BATCH):
            visited = chosen.view(BATCH, -1)[sequence]
            f = torch.stack([(visited == expert).sum() * 4 / (2 * LENGTH) for expert in range(4)])
            total = total + WEIGHT / BATCH * (f * scores[sequence].mean(0)).sum()
    return total


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("twin", TWINS)
def test_loss_and_gradients_are_those_of_the_formula(twin: str, kind: str):
    wanted, found = build(twin), build(twin)
    whole = by_the_formula(wanted)
    whole.backward()
    added = balance(found)
    recompute_layers(found, kind)
    tokens = loss(found)
    tokens.backward()
    assert added.take() == pytest.approx(whole.item() - tokens.item(), rel=1e-4) and added.take() == 0.0
    for (name, one), two in zip(wanted.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_it_reaches_the_gradient_and_weighs_with_the_data_ranks():
    """DeepSpeed averages over them."""
    gradients = []
    for weight, ranks in ((0.0, 1), (WEIGHT, 1), (WEIGHT, 4)):
        model = build("deepseek_v3")
        balance(model, weight, ranks)
        loss(model).backward()
        gradients.append(model.model.layers[1].mlp.gate.weight.grad)
    one, four = gradients[1] - gradients[0], gradients[2] - gradients[0]
    assert one.abs().max() > 1e-4
    torch.testing.assert_close(four, 4 * one, rtol=1e-3, atol=1e-6)


def test_validation_has_none():
    model = build("qwen3_moe")
    added = balance(model)
    loss(model.eval())
    assert added.take() == 0.0
