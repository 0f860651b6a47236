"""Every kind of activation checkpointing gives the same bits, and keeps and recomputes what its name says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longhaul.config.stage_config import Stage
from longhaul.train import activation_checkpointing
from longhaul.train.activation_checkpointing import apply_activation_checkpointing
from tests.support.small_configs import LLAMA

MIXTURE = {
    **LLAMA, "model_type": "deepseek_v3", "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
MODELS = {"llama": {**LLAMA, "model_type": "llama"}, "deepseek_v3": MIXTURE}
KINDS = ("none", "selective", "full", "offload")


def build(model_type: str, kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(**MODELS[model_type], use_cache=False)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()
    apply_activation_checkpointing(model, kind)
    return model


def forward(model: Any) -> torch.Tensor:
    ids = torch.randint(400, (2, 32), generator=torch.Generator().manual_seed(2))
    # Positions that restart: a packed document, for which transformers builds a mask.
    return model(input_ids=ids, labels=ids, position_ids=torch.arange(32).remainder(20).repeat(2, 1)).loss


def test_the_config_has_the_same_kinds():
    kinds = Stage.model_fields["activation_checkpointing"].annotation.__args__  # pyright: ignore
    assert kinds == (*KINDS, "auto"), "the plan replaces auto by one of the others"


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_loss_and_gradients_are_bit_equal(model_type: str, kind: str):
    plain, checkpointed = build(model_type, "none"), build(model_type, kind)
    losses = [forward(model) for model in (plain, checkpointed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, one), (_, two) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert (one.grad is None and two.grad is None) or torch.equal(one.grad, two.grad), name


class OperationCounter(TorchDispatchMode):
    """Counts matrix products and activation functions."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.activations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.activations += func is torch.ops.aten.silu.default
        return func(*args, **(kwargs or {}))


def recomputed(kind: str) -> tuple[int, int]:
    """Return the (matrix products, activation functions) of a backward pass beyond those without recomputation."""
    counts = []
    for each in ("none", kind):
        loss = forward(build("llama", each))
        with OperationCounter() as counter:
            loss.backward()
        counts.append((counter.products, counter.activations))
    return counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]


def test_each_kind_recomputes_what_its_name_says():
    """A layer has 7 products and 1 activation function; the backward pass does not need the result of the last product."""
    layers = LLAMA["num_hidden_layers"]
    assert recomputed("full") == recomputed("offload") == (6 * layers, layers)
    assert recomputed("selective") == (0, layers)


def test_offload_moves_only_the_input_of_each_layer(monkeypatch: pytest.MonkeyPatch):
    """Mask and rotary embedding, which the layers share, stay where they are."""
    moved: list[torch.Size] = []

    class RecordingHooks(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            def pack(tensor: torch.Tensor) -> torch.Tensor:
                moved.append(tensor.shape)
                return tensor.cpu()

            super().__init__(pack, lambda tensor: tensor)

    monkeypatch.setattr(activation_checkpointing, "save_on_cpu", RecordingHooks)
    forward(build("llama", "offload")).backward()
    assert moved == [torch.Size((2, 32, LLAMA["hidden_size"]))] * LLAMA["num_hidden_layers"]
