"""Operands of a loss that is large beside its chunks."""

from __future__ import annotations

import torch

TOKENS, HIDDEN, VOCABULARY = 100, 16, 64


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [N, H], weight [V, H], labels [N]: every third token is ignored, the last 20 all are."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[::3], labels[-20:] = -100, -100
    return hidden, weight, labels
