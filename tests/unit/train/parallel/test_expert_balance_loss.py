"""The balance loss of each sequence: value and gradient follow the formula, once for each step, and only in training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longhaul.config.stage_config import Parallel
from longhaul.train.activation_checkpointing import apply_activation_checkpointing
from longhaul.train.compile_layers import compile_layers
from longhaul.train.parallel.expert_balance_loss import SequenceBalanceLoss
from longhaul.train.parallel.parallel_dims import ParallelDims
from tests.support.small_configs import LLAMA

COEFFICIENT, BATCH, LENGTH = 0.5, 3, 16
MIXTURE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {"qwen3_moe": {"num_experts": 4, "head_dim": 16}, "deepseek_v3": LATENT}


def build_model(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**LLAMA, **MIXTURE, **MODELS[kind]}, use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()


def add_balance_loss(model: Any, coefficient: float = COEFFICIENT, ranks: int = 1) -> SequenceBalanceLoss:
    stage = SimpleNamespace(sequence_aux_loss_coef=coefficient, sequence_length=LENGTH, global_batch_size=BATCH)
    job: Any = SimpleNamespace(stage=stage)
    return SequenceBalanceLoss(model, ParallelDims(0, ranks, Parallel()), job, torch.device("cpu"))


TEXT = (LENGTH, 10, 5)
"""Tokens of each sequence; the others are padding."""


def positions() -> torch.Tensor:
    """Return the position ids [B, S], as samples have them."""
    return torch.stack([torch.cat([torch.arange(text), torch.arange(text - LENGTH, 0)]) for text in TEXT])


def token_loss(model: Any, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    ids = torch.randint(400, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    return model(input_ids=ids, labels=ids, position_ids=positions() if position_ids is None else position_ids).loss


def loss_by_formula(model: Any) -> torch.Tensor:
    """Return the token loss plus COEFFICIENT times the sum over layers of the mean over sequences."""
    routed: list[tuple[Any, torch.Tensor]] = []
    gates = [
        layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts")
    ]
    hooks = [gate.register_forward_hook(lambda g, _, out: routed.append((g, out[0]))) for gate in gates]
    total = token_loss(model)
    for hook in hooks:
        hook.remove()
    assert routed
    for gate, logits in routed:
        scores = logits.sigmoid() if hasattr(gate, "e_score_correction_bias") else logits.softmax(-1)
        for text, of_sequence in zip(TEXT, scores.view(BATCH, LENGTH, 4), strict=True):
            own = of_sequence[:text]
            visited = own.topk(2).indices
            visit_rate = torch.stack([(visited == expert).sum() * 4 / (2 * text) for expert in range(4)])
            affinities = own / own.sum(-1, keepdim=True)
            total = total + COEFFICIENT / BATCH * (visit_rate * affinities.mean(0)).sum()
    return total


@pytest.mark.parametrize("padded", [[0, -1], [-3, -2]], ids=["pack", "window"])
def test_the_hand_computed_case_of_equations_17_to_20(padded: list[int]):
    """Two experts of four, one of two sequences with padding, and a bias that makes the router use other experts.

    Sequence 1, tokens (0.8 0.4 0.2 0.2) and (0.4 0.8 0.2 0.2), sums 1.6: P = (3/8 3/8 1/8 1/8). Experts 0 and 1 are among the two
    largest of both tokens: f = 4 / (2 x 2) x (2 2 0 0) = (2 2 0 0). Sum of f P = 1.5.
    Sequence 2, one token (0.1 0.2 0.6 0.6), sum 1.5, and padding: P = (1 2 6 6) / 15, f = 4 / (2 x 1) x (0 0 1 1). Sum = 1.6.
    The loss is coefficient x (1.5 + 1.6) / 2 sequences.
    """
    scores_NE = torch.tensor([[0.8, 0.4, 0.2, 0.2], [0.4, 0.8, 0.2, 0.2], [0.1, 0.2, 0.6, 0.6], [0.9, 0.9, 0.9, 0.1]])
    layer = torch.nn.Module()
    layer.mlp, layer.self_attn = torch.nn.Module(), torch.nn.Identity()
    layer.mlp.experts, layer.mlp.gate = torch.nn.Identity(), Router(scores_NE.logit())
    layer.forward = lambda hidden, position_ids: layer.mlp.gate(hidden)
    model: Any = SimpleNamespace(model=SimpleNamespace(layers=[layer]))
    stage = SimpleNamespace(sequence_aux_loss_coef=0.5, sequence_length=2, global_batch_size=2)
    job: Any = SimpleNamespace(stage=stage)
    balance = SequenceBalanceLoss(model, ParallelDims(0, 1, Parallel()), job, torch.device("cpu"))
    layer(torch.zeros(4), position_ids=torch.tensor([[0, 1], padded]))
    assert balance.pop_loss().item() == pytest.approx(0.5 * (1.5 + 1.6) / 2)


class Router(torch.nn.Module):
    """A router with fixed logits [N, E], whose bias lets every token use the experts 2 and 3."""

    def __init__(self, logits_NE: torch.Tensor) -> None:
        super().__init__()
        self.logits_NE, self.e_score_correction_bias = logits_NE, torch.tensor([0.0, 0.0, 9.0, 9.0])

    def forward(self, _hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        biased_NE = self.logits_NE.sigmoid() + self.e_score_correction_bias
        chosen_NK = biased_NE.topk(2).indices
        return self.logits_NE, self.logits_NE.sigmoid().gather(1, chosen_NK), chosen_NK


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_follow_the_formula(kind: str, checkpointing: str):
    expected_model, model = build_model(kind), build_model(kind)
    expected = loss_by_formula(expected_model)
    expected.backward()
    balance = add_balance_loss(model)
    apply_activation_checkpointing(model, checkpointing)
    tokens = token_loss(model)
    tokens.backward()
    assert balance.pop_loss().item() == pytest.approx(expected.item() - tokens.item(), rel=1e-4)
    assert balance.pop_loss().item() == 0.0
    for (name, one), two in zip(expected_model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("checkpointing", "captured"),
    [("selective", "no"), ("full", "no"), ("full", "layers"), ("full", "layers around experts")],
    ids=str,
)
def test_micro_batches_of_a_pipeline_keep_their_own_padding(checkpointing: str, captured: str, dynamo: object):
    """A pipeline rank starts the second micro batch before the backward pass of the first one."""
    expected_model, model = build_model("deepseek_v3"), build_model("deepseek_v3")
    for changed in (expected_model, model):
        add_balance_loss(changed, 1.0)
    apply_activation_checkpointing(model, checkpointing)
    if captured == "layers around experts":
        experts = model.model.layers[1].mlp.experts
        experts.breaks_graph, experts.compile_parts = True, lambda _compile_part: None
    if captured != "no":
        compile_layers(model, "aot_eager")
    batches = [positions(), torch.arange(LENGTH).repeat(BATCH, 1)]
    for position_ids in batches:
        token_loss(expected_model, position_ids).backward()
    for loss in [token_loss(model, position_ids) for position_ids in batches]:
        loss.backward()
    for (name, one), two in zip(expected_model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_gradient_grows_with_the_number_of_data_ranks():
    """DeepSpeed divides by that number when it averages gradients."""
    gradients = []
    for coefficient, ranks in ((0.0, 1), (COEFFICIENT, 1), (COEFFICIENT, 4)):
        model = build_model("deepseek_v3")
        add_balance_loss(model, coefficient, ranks)
        token_loss(model).backward()
        gradients.append(model.model.layers[1].mlp.gate.weight.grad)
    one, four = gradients[1] - gradients[0], gradients[2] - gradients[0]
    assert one.abs().max() > 1e-4
    torch.testing.assert_close(four, 4 * one, rtol=1e-3, atol=1e-6)


def test_validation_adds_no_balance_loss():
    model = build_model("qwen3_moe")
    balance = add_balance_loss(model)
    token_loss(model.eval())
    assert balance.pop_loss().item() == 0.0
