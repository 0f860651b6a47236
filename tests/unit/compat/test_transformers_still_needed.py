"""Each function of compat/transformers.py is still needed. A failing test means that a public interface replaces it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace

import torch
import transformers
from transformers import DeepseekV3ForCausalLM, LlamaConfig, PreTrainedModel, masking_utils

from longhaul.compat.transformers import (
    hub_tensors,
    is_kept_in_fp32,
    known_documents,
    repeat_shared_heads_in_fp32,
    set_activation_checkpointing,
    take_over_activation_checkpointing,
    take_over_shared_experts,
    without_tied_weights,
)


def tied_model() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def test_fp32_modules_have_only_a_private_name() -> None:
    assert DeepseekV3ForCausalLM._keep_in_fp32_modules_strict == ["e_score_correction_bias"]
    assert not [name for name in dir(PreTrainedModel) if "fp32" in name and not name.startswith("_")]
    assert not is_kept_in_fp32(tied_model(), "model.norm.weight")


def test_tied_weights_are_removed_only_by_an_internal_function() -> None:
    model = tied_model()
    assert set(model.state_dict()) - set(without_tied_weights(model, model.state_dict())) == {"lm_head.weight"}
    assert not [name for name in transformers.__all__ if "tied_weights" in name]


def test_hub_names_are_computed_only_by_an_internal_function() -> None:
    model = tied_model()
    assert set(hub_tensors(model, model.state_dict())) == set(model.state_dict())
    assert not [name for name in transformers.__all__ if "weight_conversion" in name]


def test_activation_checkpointing_with_a_function_has_only_a_private_way() -> None:
    model = tied_model()
    set_activation_checkpointing(model, print)
    assert model.model.layers[0].gradient_checkpointing and model.model.layers[0]._gradient_checkpointing_func is print
    public = inspect.signature(PreTrainedModel.activation_checkpointing_enable).parameters
    assert not [name for name in public if "func" in name]
    source = inspect.getsource(PreTrainedModel._activation_checkpointing_enable)
    assert "save_on_cpu(pin_memory=True" in source and "enable_input_require_grads()" in source


def test_shared_heads_stay_shared_in_fp32_on_a_gpu_without_the_patch() -> None:
    """There the math kernel keeps S x S scores, as flash attention accepts half precision alone."""
    from transformers.integrations import sdpa_attention

    repeat_shared_heads_in_fp32()
    patched = sdpa_attention.use_gqa_in_sdpa
    repeat_shared_heads_in_fp32()
    assert sdpa_attention.use_gqa_in_sdpa is patched, "the second call changes nothing"
    key = SimpleNamespace(shape=(1, 1, 8, 64), dtype=torch.float32, is_cuda=True)
    assert patched.__wrapped__(None, key, key) and not patched(None, key, key)
    key.dtype = torch.bfloat16
    assert patched(None, key, key)


def test_the_parts_of_grouped_experts_have_no_public_names():
    from transformers.integrations import moe

    assert hasattr(moe, "_grouped_linear") and not hasattr(moe, "grouped_linear")
    assert "experts_class._apply_gate = " in inspect.getsource(moe.use_experts_implementation)


def test_shared_experts_are_computed_after_the_routed_ones():
    """take_over_shared_experts replaces this forward pass, which is the same in both classes."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    for mixture in (DeepseekV2Moe, DeepseekV3MoE):
        lines = [line.strip() for line in inspect.getsource(mixture.forward).splitlines()[1:]]
        assert lines == [
            "residuals = hidden_states",
            "orig_shape = hidden_states.shape",
            "_, topk_weights, topk_indices = self.gate(hidden_states)",
            "hidden_states = hidden_states.view(-1, hidden_states.shape[-1])",
            "hidden_states = self.experts(hidden_states, topk_indices, topk_weights).view(*orig_shape)",
            "hidden_states = hidden_states + self.shared_experts(residuals)",
            "return hidden_states",
        ]
    assert take_over_shared_experts(torch.nn.Module()) is None


def test_a_layer_calls_its_checkpoint_itself() -> None:
    model = tied_model().train()
    layer, checkpointed = model.model.layers[0], []
    assert take_over_activation_checkpointing(layer) is None

    def checkpoint(compute: Callable[..., object], *arguments: object) -> object:
        checkpointed.append(compute)
        return compute(*arguments)

    set_activation_checkpointing(model, checkpoint)
    with known_documents(False):
        model(torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=False)
        assert len(checkpointed) == 1
        assert take_over_activation_checkpointing(layer) is checkpoint
        model(torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=False)
    assert len(checkpointed) == 1 and not layer.gradient_checkpointing


def test_transformers_still_asks_the_tensor_for_documents() -> None:
    usual = masking_utils.find_packed_sequence_indices
    assert "(packed_sequence_mask[:, -1] == 0).all()" in inspect.getsource(usual)
    positions = torch.tensor([[0, 1, 2, 0, 1, -2, -1], [*range(7)]])
    with known_documents(None):
        assert masking_utils.find_packed_sequence_indices is usual
    with known_documents(True):
        numbers = masking_utils.find_packed_sequence_indices(positions)
        assert numbers is not None and torch.equal(numbers, usual(positions))
    with known_documents(False):
        assert masking_utils.find_packed_sequence_indices(positions) is None
    assert masking_utils.find_packed_sequence_indices is usual
