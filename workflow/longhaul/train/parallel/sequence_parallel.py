"""Sequence parallelism (DeepSpeed-Ulysses): divides a sample's tokens over ranks, exchanges them for heads in attention.

Only attention needs other tokens. Around it, the ranks exchange tokens for heads: each rank then has the whole sequence for
its part of the heads. All other modules work on single tokens. The exchange is part of an attention function that is
registered with transformers, so that it works for every kind of attention, including latent attention.

B samples, N query heads (or key and value heads), S tokens of the whole sequence, P ranks, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from longhaul.compat.transformers import document_numbers
from longhaul.train.batches import MicroBatch
from longhaul.train.parallel.autograd_collectives import all_to_all, name_group
from longhaul.train.parallel.parallel_dims import ParallelDims

ATTENTION = "longhaul_ulysses"


def apply_sequence_parallel(model: Any, dims: ParallelDims) -> None:
    """Let a Hugging Face causal LM compute attention over the whole sequence; its micro batches come from `slice_tokens`."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface

    ranks, group = dims.parallel.sequence, name_group(dims.group("sequence"))

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (_gather_tokens(x, ranks, group) for x in (query, key, value))
        mask = model.whole_mask
        options.pop("is_causal", None)
        output_BSND, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        return _gather_heads(output_BSND, ranks, group), None

    AttentionInterface.register(ATTENTION, attend)
    # transformers would build a mask of this rank's tokens alone, which is wrong; `attend` uses that of the whole sequence.
    AttentionMaskInterface.register(ATTENTION, lambda *_arguments, **_options: None)
    model.set_attn_implementation(ATTENTION)


def slice_tokens(model: Any, batch: MicroBatch, dims: ParallelDims) -> MicroBatch:
    """Return this rank's tokens of a batch that all ranks of the group hold; store the mask of the whole batch in the model."""
    model.whole_mask = document_mask(batch.position_ids, batch.has_several_documents)
    length = batch.input_ids.shape[1] // dims.parallel.sequence
    own = slice(dims.sequence_rank * length, (dims.sequence_rank + 1) * length)
    ids, labels, positions = (tensor[:, own] for tensor in (batch.input_ids, batch.labels, batch.position_ids))
    return MicroBatch(ids, labels, positions, has_several_documents=batch.has_several_documents)


def document_mask(position_ids_BS: torch.Tensor, has_several_documents: bool | None = None) -> torch.Tensor | None:
    """Return a mask, bool [B, 1, S, S]: a token attends to itself and to the earlier tokens of its document.

    The result is None if every row is one document: attention is causal then, and S x S entries would not fit in memory for long
    contexts.

    has_several_documents: whether a row has; None looks at the position ids, and the CPU waits for a GPU
    """
    document_BS = document_numbers(position_ids_BS)
    if not (document_BS.any() if has_several_documents is None else has_several_documents):
        return None
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return same_BSS.tril()[:, None]


def _gather_tokens(x_BNSD: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """Exchange [B, N, S / P, D] for [B, N / P, S, D]."""
    batch, heads, length, width = x_BNSD.shape
    # One block of heads for each rank: [P, B, N / P, S / P, D].
    blocks = x_BNSD.view(batch, ranks, heads // ranks, length, width).transpose(0, 1).contiguous()
    exchanged = all_to_all(blocks, group)
    return exchanged.permute(1, 2, 0, 3, 4).reshape(batch, heads // ranks, ranks * length, width)


def _gather_heads(x_BSND: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    """Exchange [B, S, N / P, D] for [B, S / P, N, D]."""
    batch, length, heads, width = x_BSND.shape
    # One block of tokens for each rank: [P, B, S / P, N / P, D].
    blocks = x_BSND.view(batch, ranks, length // ranks, heads, width).transpose(0, 1).contiguous()
    exchanged = all_to_all(blocks, group)
    return exchanged.permute(1, 2, 0, 3, 4).reshape(batch, length // ranks, ranks * heads, width)
