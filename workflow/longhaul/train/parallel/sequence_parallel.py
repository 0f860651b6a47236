"""Sequence parallelism as in DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509): ranks split the tokens of a sample.

Around attention, and only there, they exchange tokens for heads: each rank sees the whole sequence for its share of the
heads. Everything else works on a token alone. It is done in an attention function of its own, which transformers calls
with queries, keys and values of any kind of attention, latent attention included.

B samples, N query heads, G key and value heads, S tokens of the whole sequence, P ranks, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from longhaul.train.batches import MicroBatch
from longhaul.train.loss import IGNORE
from longhaul.train.parallel.autograd_collectives import all_to_all
from longhaul.train.parallel.parallel_dims import ParallelDims

ATTENTION = "longhaul_ulysses"


def split_sequences(model: Any, dims: ParallelDims) -> None:
    """Has a Hugging Face causal LM attend through the exchange; its micro batches come from `local_tokens`."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        query, key, value = (_tokens_for_heads(x, dims) for x in (query, key, value))
        mask = model.whole_mask
        options.pop("is_causal", None)
        output_BSND, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        return _heads_for_tokens(output_BSND, dims), None

    AttentionInterface.register(ATTENTION, attend)
    # A mask over this rank's tokens alone would be wrong: none is made, and `attend` brings its own.
    AttentionMaskInterface.register(ATTENTION, lambda *_arguments, **_options: None)
    model.set_attn_implementation(ATTENTION)


def local_tokens(model: Any, batch: MicroBatch, dims: ParallelDims) -> MicroBatch:
    """This rank's tokens of the batch, which all ranks of the group hold whole; keeps the mask of the whole."""
    model.whole_mask = document_mask(batch.position_ids)
    length = batch.input_ids.shape[1] // dims.parallel.sequence
    mine = slice(dims.sequence_rank * length, (dims.sequence_rank + 1) * length)
    return MicroBatch(batch.input_ids[:, mine], batch.labels[:, mine], batch.position_ids[:, mine])


def padded(batch: MicroBatch, multiple: int) -> MicroBatch:
    """The batch with as many ignored tokens behind it as make its length a multiple."""
    missing = -batch.input_ids.shape[1] % multiple
    behind = (0, missing)
    return MicroBatch(
        F.pad(batch.input_ids, behind), F.pad(batch.labels, behind, value=IGNORE), F.pad(batch.position_ids, behind)
    )


def document_mask(position_ids_BS: torch.Tensor) -> torch.Tensor | None:
    """bool [B, 1, S, S]: a token sees itself and what came before it in its document; positions restart with each.

    None where every row is one document: attention is causal then, and long contexts have no room for S x S entries.
    """
    document_BS = (position_ids_BS.diff(dim=1, prepend=position_ids_BS[:, :1] - 1) != 1).cumsum(1)
    if not document_BS.any():
        return None
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return same_BSS.tril()[:, None]


def _tokens_for_heads(x_BNSD: torch.Tensor, dims: ParallelDims) -> torch.Tensor:
    """[B, N, S / P, D] -> [B, N / P, S, D]."""
    ranks = dims.parallel.sequence
    batch, heads, length, width = x_BNSD.shape
    # One block of heads a rank: [P, B, N / P, S / P, D].
    blocks = x_BNSD.view(batch, ranks, heads // ranks, length, width).transpose(0, 1).contiguous()
    found = all_to_all(blocks, [1] * ranks, [1] * ranks, dims.group("sequence"))
    return found.permute(1, 2, 0, 3, 4).reshape(batch, heads // ranks, ranks * length, width)


def _heads_for_tokens(x_BSND: torch.Tensor, dims: ParallelDims) -> torch.Tensor:
    """[B, S, N / P, D] -> [B, S / P, N, D]."""
    ranks = dims.parallel.sequence
    batch, length, heads, width = x_BSND.shape
    blocks = x_BSND.view(batch, ranks, length // ranks, heads, width).transpose(0, 1).contiguous()
    found = all_to_all(blocks, [1] * ranks, [1] * ranks, dims.group("sequence"))
    return found.permute(1, 2, 0, 3, 4).reshape(batch, length // ranks, ranks * heads, width)
