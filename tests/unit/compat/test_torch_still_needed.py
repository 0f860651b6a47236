"""Each function of compat/torch.py is still needed. A failing test means that torch has changed or offers a public way."""

from __future__ import annotations

import inspect

import torch
import torch.utils.checkpoint

from longhaul.compat.torch import (
    allow_graphs,
    can_skip_update_on_device,
    compile_error_reason,
    is_in_backward_pass,
    matmul_and_attention_ops,
    set_update_scale,
)


def test_a_backward_pass_is_detected_only_by_a_private_function() -> None:
    seen = []
    tensor = torch.ones(1, requires_grad=True)
    tensor.register_hook(lambda _gradient: seen.append(is_in_backward_pass()))
    assert not is_in_backward_pass()
    tensor.sum().backward()
    assert seen == [True] and not is_in_backward_pass()
    assert "torch._C._current_graph_task_id()" in inspect.getsource(torch.utils.checkpoint)
    assert not [name for name in dir(torch.autograd) if "graph_task" in name or "in_backward" in name]


def test_matmul_and_attention_operators_have_only_private_names() -> None:
    names = [str(op).removeprefix("aten.").removesuffix(".default") for op in matmul_and_attention_ops()]
    assert len(names) == 9 and sum(name.startswith("_") for name in names) == 6
    assert names[-1] == "flex_attention" and not hasattr(torch.ops.aten, "flex_attention")
    public = [name.lstrip("_") for name in names if name.startswith("_")]
    assert not [name for name in public if hasattr(torch.ops.aten, name)]


def test_a_fused_optimizer_skips_an_update_only_through_the_attributes_of_the_grad_scaler() -> None:
    assert "found_inf" not in inspect.signature(torch.optim.AdamW.step).parameters
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True, weight_decay=0.0)
    assert not can_skip_update_on_device(optimizer), "only on GPUs"
    for is_bad, changes in ((1.0, False), (0.0, True)):
        weight.grad = torch.full((3,), 4.0)
        before = weight.detach().clone()
        set_update_scale(optimizer, torch.tensor(2.0), torch.tensor(is_bad))
        optimizer.step()
        assert (not torch.equal(weight, before)) == changes
    assert optimizer.state[weight]["step"] == 1
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], torch.full((3,), 0.1 * 4.0 / 2.0))


def test_errors_of_the_compiler_have_only_a_private_class() -> None:
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported

    capture, compiler = Unsupported("a graph break"), BackendCompilerFailed(print, RuntimeError("no compiler"), None)
    for error, is_capture in ((capture, True), (compiler, False)):
        reason = compile_error_reason(error)
        assert reason and reason.is_capture == is_capture
    assert compile_error_reason(RuntimeError("of the layer itself")) is None


def test_the_limit_of_graphs_is_private() -> None:
    import torch._dynamo

    assert torch._dynamo.config.recompile_limit >= 8
    allow_graphs(70)
    assert torch._dynamo.config.recompile_limit >= 70
