"""Estimates the memory of a served model on the fullest GPU: weights by precision, KV cache by kind of attention, and a reserve.

`c` is the model's config as a dict, with sizes that model_size has checked. Nothing is allocated.

How engines split a model:
    - Tensor-parallel ranks share every matrix, except MLA's projections to the low ranks and the routers, which each rank has.
      A rank holds whole key and value heads, at least one. Each rank has all vectors.
    - MLA caches one compressed vector for all heads, so each tensor-parallel rank holds it whole. `transformers serve`, which
      has one rank, caches keys and values of all heads.
    - Pipeline ranks share the layers. The first one has the embedding, the last one the head.
Sources: vLLM 0.32 and SGLang 0.5.23, `get_pp_indices` and `get_num_kv_heads`; DeepSeek-V2 (arXiv:2405.04434, section 2.1.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from longhaul.config.activation_counts import attention_width
from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.hub_tensors import (
    FP8_BLOCK,
    is_fp8_matrix,
    layer_tensors,
    outer_tensors,
    untied_where_servers_do_not_tie,
)
from longhaul.config.parameter_counts import has_latent_attention, head_dim, key_value_heads, sparse_layers

ExportDtype = Literal["fp32", "bf16", "fp8"]
USED_SHARE = 0.9
"""Share of a GPU's memory that the engine may use. The rest is for the CUDA context and for other processes."""
RESERVED_SHARE = 0.1
"""Share of a GPU's memory, within USED_SHARE, for activations, CUDA graphs and buffers of NCCL. It is an estimate."""
_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
"""Bytes of an element that is not in an FP8 matrix, and of an element of the KV cache."""
_FACTOR_BYTES = 4
_WHOLE_ON_EACH_RANK = (".q_a_proj.weight", ".kv_a_proj_with_mqa.weight", ".gate.weight")
_KEYS_AND_VALUES = (".k_proj.weight", ".v_proj.weight")


@dataclass(frozen=True)
class ServingLayout:
    """Layout of a served model over GPUs.

    tensor, pipeline: numbers of ranks; their product is nodes x gpus_per_node
    """

    nodes: int
    gpus_per_node: int
    tensor: int
    pipeline: int

    def __str__(self) -> str:
        nodes = f"{self.nodes} node" + ("s" if self.nodes > 1 else "")
        gpus = f"{self.gpus_per_node} GPU" + ("s" if self.gpus_per_node > 1 else "")
        return f"{nodes} x {gpus} (tensor {self.tensor} x pipeline {self.pipeline})"


@dataclass(frozen=True)
class ServingMemory:
    """Bytes on the fullest GPU. weights: of the model; token: keys and values of one token in all of the GPU's layers."""

    weights: int
    token: int

    def tokens_that_fit(self, gpu_bytes: float) -> int:
        """Return how many tokens the KV cache of a GPU with so much memory holds; less than 0: the weights do not fit."""
        return int((usable_bytes(gpu_bytes) - self.weights) // self.token)


def usable_bytes(gpu_bytes: float) -> float:
    """Return what weights and KV cache may use of a GPU's memory."""
    return (USED_SHARE - RESERVED_SHARE) * gpu_bytes


@dataclass(frozen=True)
class _Part:
    """Bytes of some tensors.

    shared:          over all tensor-parallel ranks
    keys_and_values: over as many ranks as there are key and value heads
    whole:           on each rank
    """

    shared: int = 0
    keys_and_values: int = 0
    whole: int = 0

    def __add__(self, other: _Part) -> _Part:
        return _Part(self.shared + other.shared, self.keys_and_values + other.keys_and_values, self.whole + other.whole)


@dataclass(frozen=True)
class ServedModel:
    """A model as it is exported.

    config:         of the trained model
    dtype:          of the export
    caches_latents: with MLA, the engine caches the compressed vectors, and not the keys and values of all heads
    """

    config: HuggingFaceConfig
    dtype: ExportDtype
    caches_latents: bool = True

    def memory(self, layout: ServingLayout) -> ServingMemory:
        """Return the most bytes of weights, and the most bytes of a token, that any GPU has."""
        ranks = list(_layer_ranges(self._layers, layout.pipeline))
        weights = max(self._weights(layout, layers) for layers in ranks)
        return ServingMemory(weights, max(map(len, ranks)) * self.token_bytes_per_layer(layout.tensor))

    def token_bytes_per_layer(self, tensor: int) -> int:
        """Return the bytes of one token in one layer of the KV cache, on one of this number of tensor-parallel ranks."""
        c, width = self.config, _BYTES[self.dtype]
        if has_latent_attention(c) and self.caches_latents:
            return width * (c["kv_lora_rank"] + c["qk_rope_head_dim"])
        if has_latent_attention(c):
            return width * attention_width(c)
        return width * 2 * max(1, key_value_heads(c) // tensor) * head_dim(c)

    @property
    def _layers(self) -> int:
        return self.config["num_hidden_layers"]

    def _weights(self, layout: ServingLayout, layers: range) -> int:
        """Return the bytes of a rank with these layers."""
        sparse = sum(self._is_sparse[layers.start : layers.stop])
        count = {True: sparse, False: len(layers) - sparse}
        total = sum(
            number * self._rank_bytes(self._layer[kind], layout.tensor) for kind, number in count.items() if number
        )
        if layers.start == 0:
            total += self._rank_bytes(self._outer["model.embed_tokens.weight"], layout.tensor)
        if layers.stop == self._layers:
            total += self._rank_bytes(self._head(layout.pipeline), layout.tensor)
        return total

    def _head(self, pipeline: int) -> _Part:
        """Return the head with the last norm. A tied head on another pipeline rank is a copy of the embedding."""
        embedding = self._outer["model.embed_tokens.weight"]
        head = self._outer.get("lm_head.weight", embedding if pipeline > 1 else _Part())
        return head + self._outer["model.norm.weight"]

    def _rank_bytes(self, part: _Part, tensor: int) -> int:
        holders = min(tensor, key_value_heads(self.config))
        return -(-part.shared // tensor) + -(-part.keys_and_values // holders) + part.whole

    @cached_property
    def _is_sparse(self) -> tuple[bool, ...]:
        return sparse_layers(self.config)

    @cached_property
    def _outer(self) -> dict[str, _Part]:
        """Name -> bytes of the tensors outside of the decoder layers."""
        tensors = outer_tensors(untied_where_servers_do_not_tie(self.config))
        return {name: self._part(name, shape) for name, shape in tensors}

    @cached_property
    def _layer(self) -> dict[bool, _Part]:
        """Map from "is the layer sparse?" to the bytes of such a layer."""
        return {
            is_sparse: sum(
                (self._part(f"model.layers.0.{name}", shape) for name, shape in layer_tensors(self.config, is_sparse)),
                start=_Part(),
            )
            for is_sparse in set(self._is_sparse)
        }

    def _part(self, name: str, shape: tuple[int, ...]) -> _Part:
        size = self._bytes(name, shape)
        if len(shape) == 1 or name.endswith(_WHOLE_ON_EACH_RANK):
            return _Part(whole=size)
        return _Part(keys_and_values=size) if name.endswith(_KEYS_AND_VALUES) else _Part(shared=size)

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        if self.dtype != "fp8" or not is_fp8_matrix(name):
            return _BYTES[self.dtype] * math.prod(shape)
        return math.prod(shape) + _FACTOR_BYTES * math.prod(-(-size // FP8_BLOCK) for size in shape)


def _layer_ranges(layers: int, pipeline: int) -> Iterator[range]:
    """Yield the layers of each pipeline rank in vLLM, then those in SGLang.

    The ranks that get one layer more are in vLLM those before the last one, in SGLang the last ones.
    """
    base, more = divmod(layers, pipeline)
    for last_without_more in (1, 0) if more else (0,):
        first = pipeline - last_without_more - more
        start = 0
        for rank in range(pipeline):
            stop = start + base + (first <= rank < first + more)
            yield range(start, stop)
            start = stop
