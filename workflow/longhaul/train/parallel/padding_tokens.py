"""Marks padding tokens for the routers, so that experts do not count them.

A decoder layer gets the position ids, which differ between text and padding (longhaul.data.sampling.sample_format). It gets
them on each pipeline rank. Where activation checkpointing computes the layer once more, its attention gets them again.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from longhaul.data.sampling.sample_format import is_text


class TextTokens:
    """The tokens of a decoder layer's current forward pass that are no padding.

    sequence_length: of a whole sample, also where ranks divide its tokens
    """

    def __init__(self, layer: Any, sequence_length: int) -> None:
        self._layer, self._position_ids = layer, cast(torch.Tensor | None, None)
        self._sequence_length = sequence_length
        layer.register_forward_pre_hook(self._remember, with_kwargs=True)
        layer.self_attn.register_forward_pre_hook(self._remember_again, with_kwargs=True)

    def _remember(self, _layer: object, _inputs: object, options: dict[str, Any]) -> None:
        self._position_ids = options["position_ids"]

    def _remember_again(self, attention: object, inputs: object, options: dict[str, Any]) -> None:
        """Remember them inside the layer: transformers runs hooks of the layer itself once, before activation checkpointing.

        A pipeline rank has begun other micro batches before it computes a layer again. If the checkpoint is inside a compiled
        graph, the position ids are an input of the graph, and torch allows no change of an attribute.
        """
        if not torch.compiler.is_compiling() or getattr(self._layer, "is_checkpointed_outside_of_graphs", False):
            self._remember(attention, inputs, options)

    def mask(self, count: int) -> torch.Tensor:
        """Return bool [count]: which of the tokens, in the order of the flattened micro batch, are no padding."""
        assert self._position_ids is not None
        is_text_BS = is_text(self._position_ids, self._sequence_length)
        return is_text_BS.expand(count // is_text_BS.shape[1], -1).flatten()
