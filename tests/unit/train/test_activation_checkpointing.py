"""Every kind of activation checkpointing gives the same bits, and keeps and repeats what its name says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longhaul.config.run_config import Stage
from longhaul.train import activation_checkpointing as recompute
from longhaul.train.activation_checkpointing import recompute_layers
from tests.support.small_configs import LLAMA

MIXTURE = {
    **LLAMA, "model_type": "deepseek_v3", "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
TWINS = {"llama": {**LLAMA, "model_type": "llama"}, "deepseek_v3": MIXTURE}
KINDS = ("none", "selective", "full", "offload")


def build(twin: str, kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(**TWINS[twin], use_cache=False)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()
    recompute_layers(model, kind)
    return model


def forward(model: Any) -> torch.Tensor:
    ids = torch.randint(400, (2, 32), generator=torch.Generator().manual_seed(2))
    # Positions that restart: a packed document, which takes a mask.
    return model(input_ids=ids, labels=ids, position_ids=torch.arange(32).remainder(20).repeat(2, 1)).loss


def test_the_kinds_are_those_of_the_config():
    assert Stage.model_fields["activation_checkpointing"].annotation.__args__ == KINDS  # pyright: ignore


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_loss_and_gradients_are_bit_equal(twin: str, kind: str):
    plain, other = build(twin, "none"), build(twin, kind)
    losses = [forward(model) for model in (plain, other)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, one), (_, two) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        assert (one.grad is None and two.grad is None) or torch.equal(one.grad, two.grad), name


class Counting(TorchDispatchMode):
    """Counts matrix products and activation functions."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.activations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.activations += func is torch.ops.aten.silu.default
        return func(*args, **(kwargs or {}))


def repeated(kind: str) -> tuple[int, int]:
    """(matrix products, activation functions) of a backward pass beyond those that it has without recomputation."""
    counts = []
    for each in ("none", kind):
        loss = forward(build("llama", each))
        with Counting() as seen:
            loss.backward()
        counts.append((seen.products, seen.activations))
    return counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]


def test_what_is_computed_again():
    """6 of 7 products (the last one's result is nothing that the backward pass needs) and one activation function a layer."""
    layers = LLAMA["num_hidden_layers"]
    assert repeated("full") == repeated("offload") == (6 * layers, layers)
    assert repeated("selective") == (0, layers)


def test_what_is_offloaded_is_each_layers_input_alone(monkeypatch: pytest.MonkeyPatch):
    """Neither the mask nor the rotary embedding, which the layers share."""
    moved: list[torch.Size] = []

    class Recording(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            def pack(tensor: torch.Tensor) -> torch.Tensor:
                moved.append(tensor.shape)
                return tensor.cpu()

            super().__init__(pack, lambda tensor: tensor)

    monkeypatch.setattr(recompute, "save_on_cpu", Recording)
    forward(build("llama", "offload")).backward()
    assert moved == [torch.Size((2, 32, LLAMA["hidden_size"]))] * LLAMA["num_hidden_layers"]
