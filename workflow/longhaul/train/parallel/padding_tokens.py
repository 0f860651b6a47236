"""Tells routers which tokens are padding, so that experts do not count them.

A decoder layer gets the position ids, which are negative for padding (longhaul.data.sampling.sample_format). It gets them in the
backward pass, too, where activation checkpointing computes it again; and on each pipeline rank.
"""

from __future__ import annotations

from typing import Any

import torch


class TextTokens:
    """The tokens of a decoder layer's current forward pass that are no padding."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._position_ids: torch.Tensor | None = None
        layer.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, _layer: object, _inputs: object, options: dict[str, Any]) -> None:
        self._position_ids = options["position_ids"]

    def mask(self, count: int) -> torch.Tensor:
        """Return bool [count]: which of the tokens, in the order of the flattened micro batch, are no padding."""
        assert self._position_ids is not None
        is_text = self._position_ids >= 0
        return is_text.expand(count // is_text.shape[1], -1).flatten()
