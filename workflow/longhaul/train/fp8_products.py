"""Computes the matrix products of the decoder layers in FP8 on GPUs (precision: fp8).

A training product has three parts: the output, the gradient of the input and the gradient of the weight. Each rounds its two
operands to FP8 with one scale for the whole tensor, which maps the largest magnitude to the largest FP8 number (current
scaling). Inputs and weights have the format e4m3, gradients e5m2 (Micikevicius et al., "FP8 Formats for Deep Learning",
arXiv:2209.05433, section 3). Sums and results are not in FP8: the GPU adds in fp32 and returns bf16.
No state is kept between steps, so a resumed training computes the same bits.

Embedding, norms, attention, routers, routed experts and head stay in bf16. So do passes in evaluation mode: validation and the
reference values of an export describe the model that is served.

M tokens, K inputs, N outputs of a layer.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.nn import functional as F

from longhaul.compat.deepspeed import unpartitioned_shape
from longhaul.compat.torch import multiply_fp8
from longhaul.errors import UserError
from longhaul.planning.constants_shared_with_trainer import FP8_MULTIPLE
from longhaul.train.parallel.sliced_parameters import decoder_layers
from longhaul.train.parallel.tensor_parallel import RowParallelLinear

_MIN_CAPABILITY = (8, 9)
"""Ada and Hopper. Older cards have no FP8 units."""
_SMALLEST_AMAX = 1e-12
"""Keeps the scale of a tensor of zeros finite."""


def check_fp8_hardware(device: torch.device) -> None:
    """Raise UserError if a GPU has no FP8 units. On CPUs, which the plan refuses, torch computes the same slowly."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY:
        return
    raise UserError(
        f"precision fp8 needs a GPU of compute capability {'.'.join(map(str, _MIN_CAPABILITY))} or higher; "
        f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}",
        "set precision to bf16, or use a partition with newer GPUs",
    )


def use_fp8_products(model: Any) -> str:
    """Let the linear layers of all decoder layers compute in FP8. Call it before layers are compiled.

    Returns a line for the log: how many of the layers' matrices are computed in FP8, and which are not.

    Raises:
        UserError: no matrix has sizes that FP8 units multiply.
    """
    linears = [
        (name, module)
        for layer in decoder_layers(model)
        for name, module in layer.named_modules()
        if isinstance(module, (torch.nn.Linear, RowParallelLinear)) and name.rpartition(".")[2] != "gate"
    ]
    fitting = [module for _, module in linears if not any(n % FP8_MULTIPLE for n in unpartitioned_shape(module.weight))]
    for module in fitting:
        # Bound methods, so that all layers of one kind share one compiled graph.
        if isinstance(module, RowParallelLinear):
            module.multiply = MethodType(_product, module)
        else:
            module.forward = MethodType(_linear_forward, module)
    others = sorted({name for name, module in linears if module not in fitting})
    if not fitting:
        raise UserError(
            f"precision fp8: the sizes of no matrix in the decoder layers are multiples of {FP8_MULTIPLE}",
            "set precision to bf16",
        )
    rest = f"; not {', '.join(others)}, whose sizes are no multiples of {FP8_MULTIPLE}" if others else ""
    return f"{len(fitting)} of {len(linears)} matrices of the decoder layers are multiplied in FP8{rest}"


def _linear_forward(linear: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """Compute torch.nn.Linear's forward pass with the product of `_product`."""
    outputs = _product(linear, inputs, linear.weight)
    return outputs if linear.bias is None else outputs + linear.bias


def _product(module: torch.nn.Module, inputs: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """Multiply inputs [..., K] and weight: in FP8 while the module trains, else as torch does."""
    if not module.training:
        return F.linear(inputs, weight_NK)
    outputs_MN: Any = Fp8Product.apply(inputs.reshape(-1, inputs.shape[-1]), weight_NK)
    return outputs_MN.view(*inputs.shape[:-1], outputs_MN.shape[-1])


class Fp8Product(torch.autograd.Function):
    """inputs [M, K] · weight [N, K]ᵀ -> outputs [M, N]. M, K and N are multiples of FP8_MULTIPLE.

    FP8 units want the first operand by rows and the second by columns, so the backward pass uses transposed copies. The weight
    is rounded again there: a copy of each layer's weight would need memory from the forward pass on.
    """

    @staticmethod
    def forward(ctx: Any, inputs_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        rounded_MK, input_scale = _round(inputs_MK, torch.float8_e4m3fn)
        rounded_NK, weight_scale = _round(weight_NK, torch.float8_e4m3fn)
        ctx.save_for_backward(rounded_MK.t().contiguous(), input_scale, weight_NK)
        return multiply_fp8(rounded_MK, input_scale, rounded_NK.t(), weight_scale, inputs_MK.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        inputs_KM, input_scale, weight_NK = ctx.saved_tensors
        slope_MN, slope_scale = _round(slopes[0], torch.float8_e5m2)
        weight_KN, weight_scale = _round(weight_NK.t(), torch.float8_e4m3fn)
        dtype = slopes[0].dtype
        inputs_slope_MK = multiply_fp8(slope_MN, slope_scale, weight_KN.t(), weight_scale, dtype)
        weight_slope_NK = multiply_fp8(slope_MN.t().contiguous(), slope_scale, inputs_KM.t(), input_scale, dtype)
        return inputs_slope_MK, weight_slope_NK


def _round(value: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in FP8, by rows, and the fp32 scalar that it must be multiplied with."""
    largest = torch.finfo(dtype).max
    scale = value.abs().amax().float().clamp(min=_SMALLEST_AMAX) / largest
    # Division by a rounded scale can exceed the largest FP8 number, which would become NaN.
    return (value.float() / scale).clamp(-largest, largest).to(dtype).contiguous(), scale
