"""Says, for plan and trainer, which stages with packs skip pairs of tokens of different documents on GPUs; others keep a mask."""

from __future__ import annotations

from longhaul.config.model_size import ModelSize
from longhaul.config.stage_config import Stage

BLOCK_TOKENS = 128
"""FlexAttention's default block of tokens."""
_SMALLEST_HEAD = 16


def skips_pairs_on_gpus(stage: Stage, sizes: ModelSize) -> bool:
    """Return whether the stage has packs, and compiled layers compute their attention with FlexAttention.

    FlexAttention has no dropout, and was compared for whole blocks of tokens and heads of 16 elements or more.
    """
    return (
        stage.kind == "sft"
        and stage.compiles_layers_on_gpus(has_experts=any(sizes.is_sparse))
        and stage.parallel.sequence == 1
        and stage.sequence_length % BLOCK_TOKENS == 0
        and sizes.head_width >= _SMALLEST_HEAD
        and not sizes.attention_dropout
    )
