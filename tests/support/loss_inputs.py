"""Inputs of a loss that has many chunks."""

from __future__ import annotations

import torch

from longhaul.data.sampling.sample_format import IGNORED_LABEL

TOKENS, HIDDEN, VOCABULARY = 100, 16, 64


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden [N, H], weight [V, H] and labels [N]; every third label is ignored, and all of the last 20."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[::3], labels[-20:] = IGNORED_LABEL, IGNORED_LABEL
    return hidden, weight, labels
