"""The loss of a global batch: the sum over its loss tokens divided by their number, whatever the layout.

Logits are the largest tensor of a step and are never whole: the head works on a chunk of the tokens at a time and makes
its gradients on the way forward, so that nothing of a chunk is kept or computed twice (as Liger's fused linear
cross-entropy, arXiv:2410.10989, section 3.2).

B samples, S tokens, N tokens of a micro batch, n of a chunk, H hidden width, V vocabulary (of this tensor rank).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from longhaul.planning.gpu_memory import LOSS_CHUNK_TOKENS
from longhaul.train.batches import MicroBatch
from longhaul.train.parallel.parallel_dims import ParallelDims

IGNORE = -100


def loss_sum(engine: Any, batch: MicroBatch, dims: ParallelDims | None = None) -> torch.Tensor:
    """Sum of the token losses of a micro batch, in fp32.

    No attention mask is given: positions that restart tell transformers where a packed document ends.
    """
    with _head_gives_loss(engine.module.lm_head, batch.labels, dims):
        return engine(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits


def head_loss_sum(
    head: torch.nn.Module, hidden_BSH: torch.Tensor, labels_BS: torch.Tensor, dims: ParallelDims | None = None
) -> torch.Tensor:
    """Sum of the token losses in fp32, from what the head of a causal LM is given."""
    with _head_gives_loss(head, labels_BS, dims):
        return head(hidden_BSH)


@contextmanager
def _head_gives_loss(head: torch.nn.Module, labels_BS: torch.Tensor, dims: ParallelDims | None) -> Iterator[None]:
    """Only the head's own forward is exchanged: hooks around it gather its weight (ZeRO-3) and sum gradients (tensor ranks)."""

    def forward(hidden_BSH: torch.Tensor) -> torch.Tensor:
        return chunked_loss_sum(hidden_BSH.flatten(0, 1), head.weight, labels_BS.flatten(), dims)  # pyright: ignore

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def chunked_loss_sum(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    dims: ParallelDims | None = None,
    chunk: int = LOSS_CHUNK_TOKENS,
) -> torch.Tensor:
    """Sum of the cross entropies of hidden · weightᵀ in fp32, a scalar; labels of IGNORE count nothing.

    Under tensor parallelism weight holds this rank's rows of the vocabulary; the gradient of hidden is then this rank's part
    of a sum.
    """
    split = dims if dims and dims.parallel.tensor > 1 else None
    return _ChunkedLoss.apply(hidden_NH, weight_VH, labels_N, split, chunk, torch.is_grad_enabled())  # pyright: ignore


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_N: torch.Tensor,
        dims: ParallelDims | None,
        chunk: int,
        with_gradients: bool,
    ) -> torch.Tensor:
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        gradients = (
            (torch.empty_like(hidden_NH), _zeros_to_sum(weight_VH, len(labels_N) > chunk)) if with_gradients else None
        )
        for start in range(0, len(labels_N), chunk):
            rows = slice(start, start + chunk)
            total += _chunk_loss(hidden_NH, weight_VH, labels_N[rows], rows, dims, gradients)
        ctx.gradients = gradients and (gradients[0], gradients[1].to(weight_VH.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        hidden_NH, weight_VH = ctx.gradients
        ctx.gradients = None
        return hidden_NH.mul_(slopes[0]), weight_VH.mul_(slopes[0]), None, None, None, None


def _zeros_to_sum(weight_VH: torch.Tensor, several: bool) -> torch.Tensor:
    """Where the weight's gradient is summed: that of several chunks in fp32, whatever the precision.

    What a late chunk adds may be less than the rounding of a 16-bit sum: over 64 chunks that was five times as far from the
    truth as the product of all at once.
    """
    return torch.zeros_like(weight_VH, dtype=torch.float32 if several else weight_VH.dtype)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds left @ right, computed in their precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _chunk_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_n: torch.Tensor,
    rows: slice,
    dims: ParallelDims | None,
    gradients: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Sum of the cross entropies of these rows; adds to the gradients [N, H] and [V, H]."""
    counts_n1 = (labels_n != IGNORE)[:, None]
    losses_n, slopes_nV = _losses_and_slopes(hidden_NH[rows] @ weight_VH.T, labels_n, dims)
    if gradients:
        gradients[0][rows] = (slopes_nV @ weight_VH).where(counts_n1, 0.0)
        _add_product(gradients[1], slopes_nV.T, hidden_NH[rows].where(counts_n1, 0.0))
    return losses_n.where(counts_n1[:, 0], 0.0).sum()


def _losses_and_slopes(
    logits_nV: torch.Tensor, labels_n: torch.Tensor, dims: ParallelDims | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross entropies [n] in fp32, their derivatives by the logits in the logits' precision): softmax minus one at the label.

    Vocabulary-parallel logits are not gathered: only numbers per token are reduced over the tensor ranks (Megatron-LM,
    arXiv:1909.08053, section 3). Of an ignored label both are without meaning.
    """
    dtype, width = logits_nV.dtype, logits_nV.shape[1]
    logs_nV = torch.log_softmax(logits_nV, -1, dtype=torch.float32)
    if dims:
        logs_nV += _share_of_all_ranks(logits_nV[:, 0].float() - logs_nV[:, 0], dims)[:, None]
    del logits_nV
    local_n1 = (labels_n - (dims.tensor_rank * width if dims else 0))[:, None]
    own_n1 = (local_n1 >= 0) & (local_n1 < width)
    local_n1 = local_n1.masked_fill(~own_n1, 0)
    label_n = logs_nV.gather(1, local_n1).where(own_n1, 0.0)[:, 0]
    if dims:
        dist.all_reduce(label_n, group=dims.group("tensor"))
    softmax_nV = logs_nV.exp_()
    softmax_nV.scatter_add_(1, local_n1, -own_n1.float())
    return -label_n, softmax_nV.to(dtype)


def _share_of_all_ranks(logsumexp_n: torch.Tensor, dims: ParallelDims) -> torch.Tensor:
    """log of this rank's part of the softmax's denominator, from the log of the sum of its own exponentials."""
    largest_n = logsumexp_n.clone()
    dist.all_reduce(largest_n, op=dist.ReduceOp.MAX, group=dims.group("tensor"))
    total_n = (logsumexp_n - largest_n).exp()
    dist.all_reduce(total_n, group=dims.group("tensor"))
    return logsumexp_n - largest_n - total_n.log()


def global_loss(summed: torch.Tensor, loss_tokens: float, data_parallel: int, accumulation: int) -> torch.Tensor:
    """This micro batch's share of the global mean.

    DeepSpeed divides the loss by the accumulation and averages gradients over the ranks; both are undone here, since
    micro batches differ in their number of loss tokens.
    """
    return summed * (data_parallel * accumulation / max(1.0, loss_tokens))
