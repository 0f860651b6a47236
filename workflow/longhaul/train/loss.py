"""Computes the cross entropy in chunks of tokens with its gradients, never whole logits; mean over the global batch.

Logits are the largest tensor of a step, so they are never held whole. The head works on a chunk of the tokens at a time and
computes its gradients in the forward pass: nothing of a chunk is kept or computed twice (Liger's fused linear cross-entropy,
arXiv:2410.10989, section 3.2).

B samples, S tokens, N tokens of a micro batch, n of a chunk, H hidden width, V vocabulary (of this tensor rank).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from longhaul.compat.deepspeed import Engine
from longhaul.compat.transformers import known_documents
from longhaul.data.sampling.sample_format import IGNORED_LABEL
from longhaul.planning.constants_shared_with_trainer import COMPILED_LOSS_CHUNK_TOKENS, LOSS_CHUNK_TOKENS
from longhaul.train.batches import MicroBatch
from longhaul.train.compile_reproducibly import compile_reproducibly
from longhaul.train.parallel.parallel_dims import ParallelDims


def loss_sum(engine: Engine, batch: MicroBatch, dims: ParallelDims | None = None) -> torch.Tensor:
    """Return the sum of a micro batch's token losses, in fp32.

    There is no attention mask: position ids that restart show transformers where a packed document ends.
    """
    with (
        _head_returns_loss(engine.module.lm_head, batch.labels, dims),
        known_documents(batch.has_several_documents),
    ):
        return engine(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits


def head_loss_sum(
    head: torch.nn.Module, hidden_BSH: torch.Tensor, labels_BS: torch.Tensor, dims: ParallelDims | None = None
) -> torch.Tensor:
    """Return the sum of the token losses, in fp32, from the input of a causal LM's head."""
    with _head_returns_loss(head, labels_BS, dims):
        return head(hidden_BSH)


@contextmanager
def _head_returns_loss(head: torch.nn.Module, labels_BS: torch.Tensor, dims: ParallelDims | None) -> Iterator[None]:
    """Replace only the head's own forward: hooks around it still gather its weight (ZeRO 3) and sum gradients (tensor ranks)."""

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
    chunk: int | None = None,
) -> torch.Tensor:
    """Return the sum of the cross entropies of hidden · weightᵀ as a scalar in fp32; a label of IGNORED_LABEL adds nothing.

    chunk: number of tokens; None: as many as fit in the memory that the plan counts

    Under tensor parallelism `weight_VH` holds this rank's rows of the vocabulary. The gradient of `hidden_NH` is then this rank's
    term of a sum over the tensor ranks.
    """
    tensor_dims = dims if dims and dims.parallel.tensor > 1 else None
    if chunk is None:
        chunk = COMPILED_LOSS_CHUNK_TOKENS if _is_compiled(hidden_NH, tensor_dims) else LOSS_CHUNK_TOKENS
    return _ChunkedLoss.apply(hidden_NH, weight_VH, labels_N, tensor_dims, chunk, torch.is_grad_enabled())  # pyright: ignore


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
            (torch.empty_like(hidden_NH), _weight_accumulator(weight_VH, len(labels_N) > chunk))
            if with_gradients
            else None
        )
        for start in range(0, len(labels_N), chunk):
            rows = slice(start, start + chunk)
            total += _chunk_loss(hidden_NH, weight_VH, labels_N[rows], rows, dims, gradients)
        ctx.gradients = gradients and (gradients[0], gradients[1].to(weight_VH.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, weight_VH = ctx.gradients
        ctx.gradients = None
        return hidden_NH.mul_(slopes[0]), weight_VH.mul_(slopes[0]), None, None, None, None


def _weight_accumulator(weight_VH: torch.Tensor, has_several_chunks: bool) -> torch.Tensor:
    """Return zeros in which to sum the weight's gradient; in fp32 for several chunks, in any precision.

    A late chunk may add less than the rounding error of a 16-bit sum. Over 64 chunks a 16-bit sum was five times as far from the
    exact gradient as one product of all tokens.
    """
    return torch.zeros_like(weight_VH, dtype=torch.float32 if has_several_chunks else weight_VH.dtype)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right, computed in the precision of the two."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:  # cuBLAS adds to fp32 what it has summed in fp32
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
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
    """Return the sum of the cross entropies of these rows; add to the gradients [N, H] and [V, H]."""
    counts_n1 = (labels_n != IGNORED_LABEL)[:, None]
    compute = _compiled_losses_and_slopes() if _is_compiled(hidden_NH, dims) else _losses_and_slopes
    losses_n, slopes_nV = compute(hidden_NH[rows] @ weight_VH.T, labels_n, dims)
    if gradients:
        gradients[0][rows] = (slopes_nV @ weight_VH).where(counts_n1, 0.0)
        _add_product(gradients[1], slopes_nV.T, hidden_NH[rows].where(counts_n1, 0.0))
    return losses_n.where(counts_n1[:, 0], 0.0).sum()


def _is_compiled(hidden_NH: torch.Tensor, dims: ParallelDims | None) -> bool:
    """Return whether one kernel computes a chunk: on GPUs with the whole vocabulary, unless the trainer compiles nothing."""
    return hidden_NH.is_cuda and dims is None and os.environ.get("TORCHDYNAMO_DISABLE") != "1"


@cache
def _compiled_losses_and_slopes() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return compile_reproducibly(_fused_losses_and_slopes)


def _fused_losses_and_slopes(
    logits_nV: torch.Tensor, labels_n: torch.Tensor, _dims: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `_losses_and_slopes` returns, in operations that the compiler fuses into two passes over the logits."""
    logits = logits_nV.float()
    logsumexp_n1 = logits.logsumexp(-1, keepdim=True)
    label_n1 = labels_n.clamp(min=0)[:, None]
    is_label_nV = torch.arange(logits.shape[1], device=logits.device) == label_n1
    slopes_nV = (logits - logsumexp_n1).exp() - is_label_nV.float()
    return (logsumexp_n1 - logits.gather(1, label_n1))[:, 0], slopes_nV.to(logits_nV.dtype)


def _losses_and_slopes(
    logits_nV: torch.Tensor, labels_n: torch.Tensor, dims: ParallelDims | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropies [n] in fp32 and their derivatives by the logits, in the logits' precision.

    The derivative is the softmax, minus one at the label. Vocabulary-parallel logits are not gathered: only numbers per token
    are reduced over the tensor ranks (Megatron-LM, arXiv:1909.08053, section 3). For an ignored label both are meaningless.
    """
    dtype, width = logits_nV.dtype, logits_nV.shape[1]
    log_softmax_nV = torch.log_softmax(logits_nV, -1, dtype=torch.float32)
    if dims:
        own_logsumexp_n = logits_nV[:, 0].float() - log_softmax_nV[:, 0]
        log_softmax_nV += _log_denominator_fraction(own_logsumexp_n, dims)[:, None]
    del logits_nV
    local_n1 = (labels_n - (dims.tensor_rank * width if dims else 0))[:, None]
    is_own_n1 = (local_n1 >= 0) & (local_n1 < width)
    local_n1 = local_n1.masked_fill(~is_own_n1, 0)
    label_n = log_softmax_nV.gather(1, local_n1).where(is_own_n1, 0.0)[:, 0]
    if dims:
        dist.all_reduce(label_n, group=dims.group("tensor"))
    softmax_nV = log_softmax_nV.exp_()
    softmax_nV.scatter_add_(1, local_n1, -is_own_n1.float())
    return -label_n, softmax_nV.to(dtype)


def _log_denominator_fraction(own_logsumexp_n: torch.Tensor, dims: ParallelDims) -> torch.Tensor:
    """Return the log of this rank's fraction of the softmax's denominator.

    own_logsumexp_n: log of the sum of the exponentials of this rank's logits
    """
    largest_n = own_logsumexp_n.clone()
    dist.all_reduce(largest_n, op=dist.ReduceOp.MAX, group=dims.group("tensor"))
    total_n = (own_logsumexp_n - largest_n).exp()
    dist.all_reduce(total_n, group=dims.group("tensor"))
    return own_logsumexp_n - largest_n - total_n.log()


def scale_to_global_mean(
    summed: torch.Tensor, loss_tokens: torch.Tensor, data_parallel: int, accumulation: int
) -> torch.Tensor:
    """Return this micro batch's contribution to the global batch's mean token loss.

    loss_tokens: those of the global batch, a scalar. DeepSpeed divides the loss by the accumulation and averages gradients over
    the data ranks. Both are undone here, as micro batches differ in their number of loss tokens.
    """
    return summed * (data_parallel * accumulation / loss_tokens.double().clamp(min=1.0)).to(summed.dtype)
