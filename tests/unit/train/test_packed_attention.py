"""Which trainings skip pairs of tokens of different documents, what layers recompute, and what passes without gradients compute.

torch refuses gradients of FlexAttention on CPUs, where it has no kernel for them. Its formulas give them nevertheless.
tests/gpu/test_attention_on_gpus.py compares the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils
from transformers.masking_utils import create_causal_mask

from longhaul.config.model_size import model_size
from longhaul.train.activation_checkpointing import apply_activation_checkpointing
from longhaul.train.compile_layers import compile_layers
from longhaul.train.packed_attention import ATTENTION, can_skip_pairs, use_packed_attention
from tests.parity.parity_cases import MODELS
from tests.support.tiny_model_sizes import tiny_stage

PACK = torch.cat([torch.arange(100), torch.arange(156)]).repeat(2, 1)
WHOLE = torch.arange(256).repeat(2, 1)


def build(name: str, **keys: Any) -> Any:
    ((kind, sizes),) = MODELS[name].items()
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**sizes, "max_position_embeddings": 256, **keys}, use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


STAGE = {"kind": "sft", "sequence_length": 256}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any], bool]] = {
    "packs": (STAGE, "llama", {}, True),
    "latent attention": (STAGE, "deepseek_v3", {}, True),
    "whole windows": ({**STAGE, "kind": "pretrain"}, "llama", {}, False),
    "a part of a block": ({**STAGE, "sequence_length": 200}, "llama", {}, False),
    "sequence parallelism": ({**STAGE, "parallel": {"sequence": 2}, "gpus_per_node": 2}, "llama", {}, False),
    "small heads": (STAGE, "llama", {"num_attention_heads": 8}, False),
    "dropout": (STAGE, "llama", {"attention_dropout": 0.1}, False),
    "layers that are not compiled": ({**STAGE, "zero": {"stage": 3}}, "qwen3_moe", {}, False),
}


@pytest.mark.parametrize(("stage", "name", "keys", "expected"), CASES.values(), ids=CASES)
def test_packs_skip_pairs_where_flex_attention_computes_the_same(
    stage: dict[str, Any], name: str, keys: dict[str, Any], expected: bool
):
    model = build(name, **keys)
    assert can_skip_pairs(tiny_stage(**stage), model_size(model.config.to_dict()), model) is expected


def test_models_of_remote_code_keep_their_attention():
    model = build("llama")
    remote: Any = type("Remote", (type(model),), {"__module__": "transformers_modules.own.modeling"})
    model.__class__ = remote
    assert not can_skip_pairs(tiny_stage(**STAGE), model_size(model.config.to_dict()), model)


def test_passes_without_gradients_compute_what_sdpa_does():
    usual, changed = build("llama").eval(), build("llama").eval()
    use_packed_attention(changed)
    ids = torch.arange(2, 258).repeat(2, 1)
    with torch.no_grad():
        for positions in (PACK, WHOLE):
            found, expected = (model(input_ids=ids, position_ids=positions).logits for model in (changed, usual))
            assert torch.equal(found, expected)


def test_only_packs_in_passes_with_gradients_get_blocks():
    model = build("llama")
    use_packed_attention(model)
    assert model.config._attn_implementation == ATTENTION

    @torch.compiler.set_stance("force_eager")  # transformers compiles the search for blocks
    def mask(positions: torch.Tensor) -> object:
        return create_causal_mask(model.config, torch.zeros(2, 256, 64), None, None, positions)

    blocks = mask(PACK)
    assert isinstance(blocks, BlockMask) and blocks.to_dense().tolist() == [[[[1, 0], [1, 1]]]] * 2
    assert mask(WHOLE) is None
    with torch.no_grad():
        dense = mask(PACK)
    assert isinstance(dense, torch.Tensor) and dense.shape == (2, 1, 256, 256) and not dense[0, 0, 150, 50]


@pytest.mark.parametrize(
    ("name", "checkpointing", "recomputed"),
    [("llama", "none", 0), ("llama", "selective", 0), ("llama", "full", 1), ("deepseek_v3", "selective", 0)],
)
def test_gradients_are_those_of_a_mask_and_only_full_computes_attention_again(
    name: str, checkpointing: str, recomputed: int, monkeypatch: pytest.MonkeyPatch, dynamo: Any
):
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_tensors: None)
    usual = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **options: usual(**{**options, "_compile": False}))
    masked, packed = (build(name, num_hidden_layers=2).train() for _ in range(2))
    use_packed_attention(packed)
    apply_activation_checkpointing(packed, checkpointing)
    graphs = RecordedGraphs()
    compile_layers(packed, graphs.backend)  # pyright: ignore[reportArgumentType]
    expected, found = (gradients(model) for model in (masked, packed))
    assert len(found) > 15 and found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-7, msg=key)
    assert len(graphs.backward) == dynamo["stats"]["unique_graphs"] == (2 if name == "deepseek_v3" else 1)
    for operators in graphs.backward:
        assert operators.count("flex_attention_backward") == 1 and operators.count("flex_attention") == recomputed


class RecordedGraphs:
    """Runs captured graphs as they are, divided into forward and backward pass as torch.compile does on GPUs.

    backward: the names of the operators of each backward pass
    """

    def __init__(self) -> None:
        self.backward: list[list[str]] = []
        self.backend = aot_autograd(
            fw_compiler=lambda graph, _inputs: make_boxed_func(graph.forward),
            bw_compiler=self._record,
            partition_fn=min_cut_rematerialization_partition,
        )

    def _record(self, graph: Any, _inputs: object) -> Any:
        self.backward.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    ids = (torch.arange(512).view(2, 256) * 7) % 397 + 2
    model(input_ids=ids, position_ids=PACK, use_cache=False).logits.logsumexp(-1).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
