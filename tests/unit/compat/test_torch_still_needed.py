"""Each function of compat/torch.py is still needed. A failing test means that torch has changed or offers a public way."""

from __future__ import annotations

import inspect

import torch
import torch.utils.checkpoint

from longhaul.compat.torch import is_in_backward_pass, matmul_and_attention_ops


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
    assert len(names) == 7 and sum(name.startswith("_") for name in names) == 5
    public = [name.lstrip("_") for name in names if name.startswith("_")]
    assert not [name for name in public if hasattr(torch.ops.aten, name)]
