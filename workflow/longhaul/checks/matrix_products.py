"""Measures how fast a GPU multiplies matrices: the limit to which the report compares the speed of a training."""

from __future__ import annotations

import statistics
import time

import torch

_SIZE, _WARMUP_ROUNDS, _ROUNDS = 8192, 5, 20


def matrix_tflops(device: torch.device, size: int = _SIZE) -> float:
    """Return the rate of bf16 products of two size x size matrices in TFLOP/s: 2 size³ operations by the median time.

    8192 is large enough for every GPU in use: the rate no longer grows with the size. Three matrices take 0.4 GB.
    """
    a_NN, b_NN = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out_NN = torch.empty_like(a_NN)
    times_s = [_product_s(a_NN, b_NN, out_NN) for _ in range(_WARMUP_ROUNDS + _ROUNDS)][_WARMUP_ROUNDS:]
    return 2 * size**3 / statistics.median(times_s) / 1e12


def _product_s(a_NN: torch.Tensor, b_NN: torch.Tensor, out_NN: torch.Tensor) -> float:
    _synchronize(a_NN.device)
    started = time.perf_counter()
    torch.mm(a_NN, b_NN, out=out_NN)
    _synchronize(a_NN.device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
