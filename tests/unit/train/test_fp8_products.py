"""precision fp8: products equal those of rounded operands, only the matrices of decoder layers use it, and only in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.errors import UserError
from longhaul.train.compile_layers import compile_layers
from longhaul.train.fp8_products import Fp8Product, check_fp8_hardware, use_fp8_products
from tests.parity.parity_cases import MODELS

pytestmark = pytest.mark.usefixtures("dynamo")

IDS = torch.arange(2, 34).view(2, 16)


def build(name: str, **keys: Any) -> Any:
    ((kind, sizes),) = MODELS[name].items()
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**sizes, **keys}, use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model(input_ids=IDS).logits.logsumexp(-1).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def in_fp8(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round in float64: the numbers of the format, at the scale that maps the largest magnitude to the format's largest."""
    scale = value.abs().max().double() / torch.finfo(dtype).max
    return (value.double() / scale).to(dtype).double() * scale


def test_a_product_and_its_gradients_are_those_of_rounded_operands():
    generator = torch.Generator().manual_seed(5)
    inputs_MK, weight_NK, slope_MN = (
        torch.randn(*shape, generator=generator) for shape in ((48, 32), (16, 32), (48, 16))
    )
    inputs_MK[3, 4] = 40.0  # an outlier decides the scale
    x, w = inputs_MK.clone().requires_grad_(), weight_NK.clone().requires_grad_()
    outputs_MN: Any = Fp8Product.apply(x, w)
    outputs_MN.backward(slope_MN)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    rounded_x, rounded_w, rounded_slope = in_fp8(inputs_MK, e4m3), in_fp8(weight_NK, e4m3), in_fp8(slope_MN, e5m2)
    for found, expected in (
        (outputs_MN, rounded_x @ rounded_w.T),
        (x.grad, rounded_slope @ rounded_w),
        (w.grad, rounded_slope.T @ rounded_x),
    ):
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
    exact = inputs_MK @ weight_NK.T
    assert 0.005 < (outputs_MN - exact).norm() / exact.norm() < 0.1, "FP8 has two to three digits less"


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e38])
def test_zeros_and_extreme_magnitudes_give_finite_numbers(value: float):
    x, w = torch.full((16, 16), value, requires_grad=True), torch.eye(16, requires_grad=True)
    outputs: Any = Fp8Product.apply(x, w)
    assert torch.allclose(outputs, x, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_reaches_loss_and_gradients(value: float):
    """The detection of bad steps looks at these: FP8's rounding must not hide it behind a largest number."""
    x, w = torch.ones(16, 16), torch.eye(16)
    bad = x.clone()
    bad[3, 4] = value
    for inputs, weight in ((bad, w), (x, bad)):
        outputs: Any = Fp8Product.apply(inputs.clone().requires_grad_(), weight.clone().requires_grad_())
        assert not outputs.isfinite().all()
    inputs, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
    products: Any = Fp8Product.apply(inputs, weight)
    products.backward(bad)
    assert inputs.grad is not None and weight.grad is not None
    assert not inputs.grad.isfinite().all() and not weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("llama", "28 of 28 matrices of the decoder layers are multiplied in FP8"),
        ("qwen3_moe", "16 of 16 matrices of the decoder layers are multiplied in FP8"),
        (
            "deepseek_v3",
            "28 of 32 matrices of the decoder layers are multiplied in FP8; not self_attn.kv_a_proj_with_mqa, whose sizes are no "
            "multiples of 16",
        ),
    ],
)
def test_matrices_of_decoder_layers_use_fp8_and_routers_do_not(name: str, line: str):
    model = build(name)
    assert use_fp8_products(model) == line
    assert not any("gate." in key or "lm_head" in key for key in _replaced(model))


def _replaced(model: Any) -> list[str]:
    return [f"{name}." for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_model_without_a_fitting_matrix_is_refused():
    model = build(
        "qwen2", hidden_size=24, intermediate_size=40, num_attention_heads=2, num_key_value_heads=1, head_dim=12
    )
    with pytest.raises(UserError, match=r"the sizes of no matrix in the decoder layers are multiples of 16"):
        use_fp8_products(model)


def test_evaluation_mode_computes_as_the_exported_model_does():
    plain, changed = build("llama"), build("llama")
    use_fp8_products(changed)
    with torch.no_grad():
        assert torch.equal(changed.eval()(input_ids=IDS).logits, plain.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_layers_are_captured_with_equal_gradients_which_are_near_those_of_fp32(name: str, dynamo: Any):
    exact, eager, captured = (build(name) for _ in range(3))
    for model in (eager, captured):
        use_fp8_products(model)
    compile_layers(captured, "aot_eager")
    expected, found, in_fp32 = gradients(eager), gradients(captured), gradients(exact)
    assert all(torch.equal(found[key], expected[key]) for key in expected) and found.keys() == in_fp32.keys()
    assert dynamo["stats"]["unique_graphs"] == (2 if name == "deepseek_v3" else 1)
    name_of_q = next(key for key in in_fp32 if "mlp.down_proj" in key)
    likeness = F.cosine_similarity(found[name_of_q].flatten(), in_fp32[name_of_q].flatten(), dim=0)
    assert 0.98 < likeness < 0.99999


def test_older_gpus_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(UserError, match=r"compute capability 8\.9 or higher; NVIDIA A100-SXM4-80GB has 8\.0"):
        check_fp8_hardware(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    check_fp8_hardware(torch.device("cuda"))
    check_fp8_hardware(torch.device("cpu"))
