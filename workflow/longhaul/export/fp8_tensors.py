"""Quantizes matrices to block-scaled FP8 (128 x 128, float8_e4m3fn), as DeepSeek publishes them.

A matrix [M, N] is float8_e4m3fn. Each block of 128 x 128 elements has one fp32 factor, the block's largest absolute value divided
by 448, the largest number of the type. An element is its FP8 value times its block's factor. Source: weight_dequant in
inference/kernel.py of https://github.com/deepseek-ai/DeepSeek-V3.

Embedding, head, norms, biases and routers are not stored in FP8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.hub_tensors import FP8_BLOCK as BLOCK
from longhaul.config.hub_tensors import is_fp8_matrix
from longhaul.config.parameter_counts import sparse_layers
from longhaul.export.exported_tensors import ExportedTensor

FACTORS = "_scale_inv"
DTYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(DTYPE).max
# Half a step between neighbouring values: 3 bits behind the leading one; 2^-9 is the smallest value.
_RELATIVE_ERROR, _ABSOLUTE_ERROR = 2.0**-4, 2.0**-10
_SMALLEST_FACTOR = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Fp8Matrix(ExportedTensor):
    """A matrix in FP8. It is read and written in whole rows of blocks."""

    @property
    def block_elements(self) -> int:
        """Number of elements that are read and written at once."""
        return BLOCK * self.shape[1]

    @property
    def factors(self) -> Fp8Factors:
        """The tensor of the factors."""
        shape = (-(-self.shape[0] // BLOCK), -(-self.shape[1] // BLOCK))
        name = self.name + FACTORS
        return Fp8Factors(name, shape, torch.float32, self.model_name, self.master, self.start, self.shape)

    def values(self, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop) in FP8."""
        masters_RN = self._masters(start, stop)
        scaled_RN = masters_RN / _spread(_factors(masters_RN), masters_RN)
        return scaled_RN.clamp_(-_LARGEST, _LARGEST).to(DTYPE).flatten()

    def dequantize(self, start: int, stored: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return elements from `start` on in fp32.

        stored:  their FP8 values, as fp32
        factors: of the whole matrix
        """
        rows_RN = stored.view(-1, self.shape[1])
        return (rows_RN * _spread(self._factors_of(start, rows_RN, factors), rows_RN)).flatten()

    def largest_error(self, start: int, dequantized: torch.Tensor, factors: torch.Tensor) -> float:
        """Return the largest error of elements from `start` on, as a multiple of what rounding to FP8 allows.

        Rounding allows 1/16 of a weight, and 1/1024 of the factor for the smallest ones.
        """
        found_RN = dequantized.view(-1, self.shape[1])
        masters_RN = self._masters(start, start + dequantized.numel())
        smallest_RN = _spread(self._factors_of(start, masters_RN, factors), masters_RN) * _ABSOLUTE_ERROR
        allowed_RN = torch.maximum(masters_RN.abs() * _RELATIVE_ERROR, smallest_RN)
        return ((found_RN - masters_RN).abs() / allowed_RN).max().item()

    def _factors_of(self, start: int, rows_RN: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        first = start // self.block_elements
        return factors[first : first + -(-rows_RN.shape[0] // BLOCK)]

    def _masters(self, start: int, stop: int) -> torch.Tensor:
        return self.master.read_range(self.start + start, self.start + stop).view(-1, self.shape[1])


@dataclass(frozen=True)
class Fp8Factors(ExportedTensor):
    """The factors of a matrix's blocks; one row of them belongs to 128 rows of the matrix."""

    matrix_shape: tuple[int, ...] = ()

    holds_weights = False

    @property
    def block_elements(self) -> int:
        """Number of elements that are read and written at once."""
        return self.shape[1]

    def values(self, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop), which are whole rows."""
        rows, columns = self.matrix_shape
        first = start // self.shape[1] * BLOCK
        last = min(stop // self.shape[1] * BLOCK, rows)
        masters = self.master.read_range(self.start + first * columns, self.start + last * columns)
        return _factors(masters.view(-1, columns)).flatten()


def with_fp8_matrices(tensors: Iterable[ExportedTensor]) -> Iterator[ExportedTensor]:
    """Yield the tensors with every matrix of the decoder layers in FP8, followed by its factors."""
    for tensor in tensors:
        if not is_fp8_matrix(tensor.name):
            yield tensor
            continue
        matrix = Fp8Matrix(tensor.name, tensor.shape, DTYPE, tensor.model_name, tensor.master, tensor.start)
        yield matrix
        yield matrix.factors


def quantization_config(network: HuggingFaceConfig) -> HuggingFaceConfig:
    """Return the section quantization_config of the config.json of a network.

    DeepSeek's networks leave out head and router by themselves; for other families the section names them. It names no router
    of a dense layer: transformers 4 takes `mlp.gate` for a part of `mlp.gate_proj`, and would read FP8 numbers without factors.
    """
    config: HuggingFaceConfig = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    if not network["model_type"].startswith("deepseek"):
        routers = [
            f"model.layers.{layer}.mlp.gate" for layer, is_sparse in enumerate(sparse_layers(network)) if is_sparse
        ]
        config["modules_to_not_convert"] = ["lm_head", *routers]
    return config


def _factors(rows_RN: torch.Tensor) -> torch.Tensor:
    """Return the factors [R / 128, N / 128] of rows that begin with a block, both sizes rounded up."""
    rows, columns = rows_RN.shape
    padded = F.pad(rows_RN, (0, -columns % BLOCK, 0, -rows % BLOCK))
    largest = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).abs().amax((1, 3))
    return (largest / _LARGEST).clamp_(min=_SMALLEST_FACTOR)


def _spread(factors: torch.Tensor, like_RN: torch.Tensor) -> torch.Tensor:
    """Return the factor of each element of `like_RN`."""
    rows, columns = like_RN.shape
    return factors.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
