"""Measures how fast a device multiplies matrices, and verifies products whose exact result is known."""

from __future__ import annotations

import statistics
import time

import torch

_SIZE, _WARMUP_ROUNDS, _ROUNDS = 8192, 5, 20
_NONZERO_OF = 8
"""Number of equally likely integers; two of them become -1 and 1, the others 0."""


def matrix_tflops(device: torch.device, size: int = _SIZE) -> float:
    """Return the rate of bf16 products of two size x size matrices in TFLOP/s: 2 size³ operations by the median time.

    8192 is large enough for every GPU in use: the rate no longer grows with the size. Three matrices take 0.4 GB.
    """
    a_NN, b_NN = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out_NN = torch.empty_like(a_NN)
    times_s = [_product_s(a_NN, b_NN, out_NN) for _ in range(_WARMUP_ROUNDS + _ROUNDS)][_WARMUP_ROUNDS:]
    return 2 * size**3 / statistics.median(times_s) / 1e12


class ExactProduct:
    """A bf16 product of two matrices of -1, 0 and 1 that is exact on every device, in any order of additions.

    A quarter of the elements is not 0. So elements of the product of two 8192 x 8192 matrices have a standard deviation of
    sqrt(8192) / 4 = 23, and none exceeds 256, up to which bf16 holds every integer.

    a_NN, b_NN: the factors, int8 in host memory
    """

    def __init__(self, size: int = _SIZE) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a_NN, self.b_NN = (_signs(size, generator) for _ in range(2))
        # Not 0: an error in a column of weight 0 would change no sum.
        self.weights_N = (torch.arange(size) % 7 + 1).double()
        # Exact, too: 8192 * 8192 * 7 is far below 2^53.
        self.sums_N = self.a_NN.double() @ (self.b_NN.double() @ self.weights_N)

    def factors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both factors in bf16 on a device."""
        return self.a_NN.to(device).bfloat16(), self.b_NN.to(device).bfloat16()

    def count_wrong_rows(self, product_NN: torch.Tensor) -> int:
        """Return how many rows of a product have another weighted sum than the exact product. NaN is wrong."""
        sums_N = product_NN.double() @ self.weights_N.to(product_NN.device)
        return int((sums_N.cpu() != self.sums_N).sum())


def _signs(size: int, generator: torch.Generator) -> torch.Tensor:
    numbers_NN = torch.randint(0, _NONZERO_OF, (size, size), generator=generator, dtype=torch.int8)
    return (numbers_NN == 1).to(torch.int8) - (numbers_NN == 0).to(torch.int8)


def _product_s(a_NN: torch.Tensor, b_NN: torch.Tensor, out_NN: torch.Tensor) -> float:
    synchronize(a_NN.device)
    started = time.perf_counter()
    torch.mm(a_NN, b_NN, out=out_NN)
    synchronize(a_NN.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
