"""The chunked loss equals the loss of whole logits, for any chunk size and any slicing of the vocabulary, with less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from longhaul.data.sampling.sample_format import IGNORED_LABEL
from longhaul.train.loss import chunked_loss_sum
from tests.support.launch_ranks import run_worker
from tests.support.loss_inputs import HIDDEN, TOKENS, VOCABULARY, operands

SCALE = 0.125


def whole(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss and the gradients of hidden and weight from torch's own cross entropy."""
    hidden, weight, labels = operands(dtype)
    logits = (hidden @ weight.T).float()
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    (loss * SCALE).backward()
    return loss.detach(), *_gradients(hidden, weight)


def chunked(chunk: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, labels = operands(dtype)
    loss = chunked_loss_sum(hidden, weight, labels, chunk=chunk)
    (loss * SCALE).backward()
    return loss.detach(), *_gradients(hidden, weight)


def _gradients(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference in units of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("chunk", [1, 7, 50, TOKENS, 10 * TOKENS])
def test_any_chunk_size_gives_the_loss_and_gradients_of_whole_logits(chunk: int):
    for found, expected in zip(chunked(chunk), whole(), strict=True):
        assert relative(found, expected) <= 1e-6


@pytest.mark.parametrize("chunk", [25, 1])
def test_in_half_precision_the_error_is_that_of_whole_logits(chunk: int):
    for exact, ours, theirs in zip(whole(), chunked(chunk, torch.bfloat16), whole(torch.bfloat16), strict=True):
        assert relative(ours.float(), exact) <= 1.5 * relative(theirs.float(), exact) + 1e-6


def test_many_chunks_in_half_precision_do_not_lose_precision_of_the_weights_gradient():
    """Hidden states have a common direction, so the sum grows from chunk to chunk far beyond what a late chunk adds."""
    generator = torch.Generator().manual_seed(3)
    hidden = (torch.randn(4096, 16, generator=generator) + torch.randn(16, generator=generator)).bfloat16()
    weight = (0.05 * torch.randn(64, 16, generator=generator)).bfloat16()
    labels = torch.randint(64, (4096,), generator=generator)

    def gradient(chunk: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        own = weight.detach().to(dtype, copy=True).requires_grad_()
        chunked_loss_sum(hidden.to(dtype), own, labels, chunk=chunk).backward()
        assert own.grad is not None and own.grad.dtype == dtype
        return own.grad.float()

    exact = gradient(4096, torch.float32)
    at_once, in_chunks = ((found - exact).norm() for found in (gradient(4096), gradient(32)))
    assert 0 < in_chunks <= 1.5 * at_once


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_vocabulary_sliced_over_ranks_gives_the_same(tmp_path: Path, ranks: int):
    run_worker(Path(__file__).parents[2] / "support" / "chunked_loss_worker.py", ranks, str(tmp_path))
    found = load_file(tmp_path / f"ranks{ranks}.safetensors")
    loss, hidden, weight = whole()
    assert relative(found["loss"], loss) <= 1e-6
    assert relative(found["hidden"] * SCALE, hidden) <= 1e-6
    assert relative(found["weight"] * SCALE, weight) <= 1e-6


def test_without_a_loss_token_all_gradients_are_zero():
    hidden, weight, labels = operands()
    loss = chunked_loss_sum(hidden, weight, torch.full_like(labels, IGNORED_LABEL))
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in _gradients(hidden, weight))


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_largest_tensor_is_a_chunk_of_logits():
    """Only the gradients of hidden states and weight are larger, which the step needs anyway."""
    hidden, weight, labels = operands()
    with LargestTensor() as largest:
        chunked_loss_sum(hidden, weight, labels, chunk=25).backward()
    assert largest.elements == max(25 * VOCABULARY, TOKENS * HIDDEN, VOCABULARY * HIDDEN)
    with LargestTensor() as largest:
        chunked_loss_sum(hidden, weight, labels, chunk=TOKENS).backward()
    assert largest.elements == TOKENS * VOCABULARY


def test_without_gradients_no_gradient_tensor_is_allocated():
    hidden, weight, labels = operands()
    with torch.no_grad(), LargestTensor() as largest:
        loss = chunked_loss_sum(hidden, weight, labels, chunk=5)
    assert relative(loss, whole()[0]) <= 1e-6
    assert largest.elements == max(5 * VOCABULARY, VOCABULARY * HIDDEN)  # the transposed weight, which is a view
