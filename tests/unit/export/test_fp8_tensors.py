"""Matrices are stored in blocks of FP8 as DeepSeek publishes them, within the stated error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longhaul.checkpoint_io import open_safetensors
from longhaul.export.exported_tensors import ExportedTensor
from longhaul.export.fp8_tensors import Fp8Factors, Fp8Matrix, quantization_config, with_fp8_matrices
from longhaul.export.tensor_blocks import blocks_of
from tests.support.fp8_folder import quantize

SHAPES = [(128, 128), (1, 1), (300, 200), (257, 129), (384, 64)]
NAME = "model.layers.3.mlp.experts.7.down_proj.weight"


def matrix_of(folder: Path, values: torch.Tensor, start: int = 0, shape: tuple[int, ...] = ()) -> Fp8Matrix:
    """Return the FP8 matrix of `shape` that begins at element `start` of the stored values."""
    save_file({NAME: values}, folder / "masters.safetensors")
    master = open_safetensors(folder / "masters.safetensors")[NAME]
    (matrix, factors) = with_fp8_matrices(
        [ExportedTensor(NAME, shape or tuple(values.shape), torch.bfloat16, NAME, master, start)]
    )
    assert isinstance(matrix, Fp8Matrix) and isinstance(factors, Fp8Factors)
    return matrix


def whole(tensor: ExportedTensor) -> torch.Tensor:
    """Return a tensor as the writer writes it, block after block."""
    return torch.cat([tensor.values(start, stop) for start, stop in blocks_of(tensor)]).view(tensor.shape)


def random_matrix(shape: tuple[int, ...]) -> torch.Tensor:
    """Return values of many sizes, in blocks of other sizes."""
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator) * torch.exp(4 * torch.randn(shape, generator=generator))


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_factors_are_those_of_whole_blocks(tmp_path: Path, shape: tuple[int, int]):
    values = random_matrix(shape)
    matrix = matrix_of(tmp_path, values)
    expected, factors = quantize(values)
    assert torch.equal(whole(matrix).float(), expected.float())
    assert torch.equal(whole(matrix.factors), factors)


def test_an_expert_is_a_part_of_its_master(tmp_path: Path):
    values = random_matrix((6, 40, 50))
    matrix = matrix_of(tmp_path, values, start=2 * 40 * 50, shape=(40, 50))
    expected, factors = quantize(values[2])
    assert torch.equal(whole(matrix).float(), expected.float()) and torch.equal(whole(matrix.factors), factors)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_within_the_stated_bound(tmp_path: Path, shape: tuple[int, int]):
    values = random_matrix(shape)
    matrix = matrix_of(tmp_path, values)
    factors, stored = whole(matrix.factors), whole(matrix).float().flatten()
    for start, stop in blocks_of(matrix):
        found = matrix.dequantize(start, stored[start:stop], factors)
        assert matrix.largest_error(start, found, factors) <= 1 + 1e-5
        expected = values.flatten()[start:stop]
        allowed = torch.maximum(expected.abs() / 16, factors.max() / 1024)
        assert ((found - expected).abs() <= allowed * (1 + 1e-5)).all()


def test_an_error_above_the_bound_is_seen(tmp_path: Path):
    values = torch.full((128, 128), 3.0)
    matrix = matrix_of(tmp_path, values)
    factors = whole(matrix.factors)
    assert matrix.largest_error(0, (values * 1.1).flatten(), factors) == pytest.approx(1.6, rel=1e-5)


def test_zeros_stay_zeros(tmp_path: Path):
    matrix = matrix_of(tmp_path, torch.zeros(130, 130))
    factors = whole(matrix.factors)
    assert factors.isfinite().all()
    assert not matrix.dequantize(0, whole(matrix).float().flatten(), factors).any()


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.gate.e_score_correction_bias",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
def test_other_tensors_are_not_rounded(tmp_path: Path, name: str):
    save_file({name: torch.ones(4, 4)}, tmp_path / "masters.safetensors")
    tensor = ExportedTensor(
        name, (4, 4), torch.bfloat16, name, open_safetensors(tmp_path / "masters.safetensors")[name]
    )
    assert list(with_fp8_matrices([tensor])) == [tensor]


def test_router_and_head_are_named_where_the_family_does_not_leave_them_out():
    """transformers 4 and older versions of SGLang take `mlp.gate` for a part of `mlp.gate_proj` in a dense layer."""
    mixture = {"model_type": "qwen3_moe", "num_hidden_layers": 3, "mlp_only_layers": [0]}
    assert quantization_config(mixture)["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.1.mlp.gate",
        "model.layers.2.mlp.gate",
    ]
    dense = {"model_type": "llama", "num_hidden_layers": 2}
    assert quantization_config(dense)["modules_to_not_convert"] == ["lm_head"]
    assert "modules_to_not_convert" not in quantization_config({"model_type": "deepseek_v3", "num_hidden_layers": 2})
