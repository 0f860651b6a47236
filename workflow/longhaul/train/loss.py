"""The loss of a global batch: the sum over its loss tokens divided by their number, whatever the layout.

B samples, S tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from longhaul.train.batches import MicroBatch
from longhaul.train.parallel.grid import Grid

IGNORE = -100


def loss_sum(engine: Any, batch: MicroBatch, grid: Grid | None = None) -> torch.Tensor:
    """Sum of the token losses of a micro batch, in fp32.

    No attention mask is given: positions that restart tell transformers where a packed document ends.
    """
    logits_BSV = engine(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    return token_loss_sum(logits_BSV, batch.labels, grid)


def token_loss_sum(logits_BSV: torch.Tensor, labels_BS: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
    """Sum of the token losses in fp32; under tensor parallelism a rank's logits are those of its part of the vocabulary."""
    logits_NV, labels_N = logits_BSV.flatten(0, 1), labels_BS.flatten()
    if grid and grid.parallel.tensor > 1:
        from longhaul.train.parallel.tensor import vocabulary_parallel_loss_sum

        return vocabulary_parallel_loss_sum(logits_NV, labels_N, IGNORE, grid)
    return torch.nn.functional.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORE, reduction="sum")


def global_loss(summed: torch.Tensor, loss_tokens: float, data_parallel: int, accumulation: int) -> torch.Tensor:
    """This micro batch's share of the global mean.

    DeepSpeed divides the loss by the accumulation and averages gradients over the ranks; both are undone here, since
    micro batches differ in their number of loss tokens.
    """
    return summed * (data_parallel * accumulation / max(1.0, loss_tokens))
