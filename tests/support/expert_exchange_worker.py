"""Computes experts that ranks divide, and compares them with the undivided module: outputs, gradients, rows that are sent.

It prints one line for each case: "EXPERTS <case>, <kind>: <largest difference> <rows sent by each rank>". A mixture with shared
experts prints "ORDER <forward or backward>: <events>" and "SHARED <largest difference of a gradient>".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.compat.deepspeed_ops import disable_shm_comm
from longhaul.compat.transformers import take_over_shared_experts
from longhaul.config.stage_config import Parallel
from longhaul.runtime.process_rank import exit_without_cleanup
from longhaul.train.compile_layers import compile_part
from longhaul.train.experts_on_gpus import use_experts_for_gpus
from longhaul.train.parallel.expert_parallel import ExpertParallel
from longhaul.train.parallel.parallel_dims import build_parallel_dims
from longhaul.train.parallel.row_exchange import _RowsUnderWay

EXPERTS, HIDDEN, TOKENS = 8, 24, 12

Routing = Callable[[int, int], torch.Tensor]
"""Returns the experts [T, K] that the tokens of a rank choose, for (rank, ranks)."""


def random_routing(choices: int, rank: int, _ranks: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(TOKENS, EXPERTS, generator=generator).topk(choices).indices


CASES: dict[str, Routing] = {
    "one choice": partial(random_routing, 1),
    "three choices": partial(random_routing, 3),
    "every expert": partial(random_routing, EXPERTS),
    "all choices on the next rank": lambda rank, ranks: (
        random_routing(2, 0, ranks) % (EXPERTS // ranks) + (rank + 1) % ranks * (EXPERTS // ranks)
    ),
    "a rank without rows": lambda _rank, ranks: random_routing(2, 1, ranks) % (EXPERTS - EXPERTS // ranks),
    "one row in all": lambda _rank, _ranks: torch.tensor([[0, 1]]),
}


def build_mixture(kind: str) -> Any:
    """Return transformers' mixture of one layer."""
    keys = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": 8,
        "num_experts": EXPERTS,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "decoder_sparse_step": 1,
        "first_k_dense_replace": 0,
    }
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)
    return model.model.layers[0].mlp


def divide(experts: Any, is_captured: bool, shared: torch.nn.Module | None = None) -> ExpertParallel:
    """Return this rank's experts, with the values of the undivided ones."""
    ranks = dist.get_world_size()
    dims = build_parallel_dims(Parallel(expert=ranks), dist.get_rank(), ranks)
    divided = ExpertParallel(deepcopy(experts), dims, shared)
    own = slice(divided.first_expert, divided.first_expert + divided.local_experts)
    with torch.no_grad():
        for name, parameter in divided.local.named_parameters():
            parameter.copy_(experts.get_parameter(name)[own])
    if is_captured:
        layer = torch.nn.Module()
        layer.mlp = torch.nn.Module()
        layer.mlp.experts = divided
        model = torch.nn.Module()
        model.model = torch.nn.Module()
        model.model.layers = torch.nn.ModuleList([layer])
        use_experts_for_gpus(model)
        divided.compile_parts(partial(compile_part, "aot_eager"))
    return divided


class SentRows(TorchDispatchMode):
    """Collects the sizes of what this rank gives to all-to-all: (rows, width, dtype)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.alltoall_base_.default:
            self.sizes.append((len(args[1]), args[1].shape[1], args[1].dtype))
        return func(*args, **(kwargs or {}))


def gradients(
    experts: torch.nn.Module, chosen_TK: torch.Tensor, compute: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the output, and the gradients of hidden states, router weights and experts."""
    generator = torch.Generator().manual_seed(10 + dist.get_rank())
    hidden, weights = (
        torch.randn(len(chosen_TK), width, generator=generator, dtype=torch.float32).requires_grad_()
        for width in (HIDDEN, chosen_TK.shape[1])
    )
    output = compute(hidden, chosen_TK, weights)
    (output * torch.randn(output.shape, generator=generator, dtype=torch.float32)).sum().backward()
    assert hidden.grad is not None and weights.grad is not None
    found = {name: parameter.grad for name, parameter in experts.named_parameters() if parameter.grad is not None}
    return {"output": output.detach(), "hidden": hidden.grad, "weights": weights.grad, **found}


def compare(routing: Routing, is_captured: bool, is_recomputed: bool) -> tuple[float, list[int]]:
    """Return the largest relative difference from the undivided module, and the rows that each rank gives to each exchange."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    chosen, whole = routing(rank, ranks), build_mixture("qwen3_moe").experts
    divided = divide(whole, is_captured)
    expected = gradients(whole, chosen, whole)
    compute = partial(checkpoint, divided, use_reentrant=False) if is_recomputed else divided
    sent = SentRows()
    with nullcontext() if is_captured else sent:  # torch captures nothing while such a mode looks on
        found = gradients(divided.local, chosen, compute)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert bool(graphs) == is_captured, graphs
    for name in ("gate_up_proj", "down_proj"):
        dist.all_reduce(expected[name])
        expected[name] = expected[name][divided.first_expert : divided.first_expert + divided.local_experts]
    assert found.keys() == expected.keys()
    difference = torch.stack(
        [(found[key] - expected[key]).abs().max() / expected[key].abs().max() for key in expected]
    ).max()
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    rows = [size for size, width, _ in sent.sizes if width == HIDDEN]
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, rows)
    return difference.item(), gathered


def compute_shared_experts() -> tuple[float, dict[str, list[str]]]:
    """Return the largest relative difference of a mixture with shared experts, and the order of what its passes compute."""
    expected, found = build_mixture("deepseek_v3"), build_mixture("deepseek_v3")
    found.experts = divide(found.experts, False, take_over_shared_experts(found))
    events: list[str] = []
    order: dict[str, list[str]] = {}
    found.shared_experts.register_forward_hook(lambda *_: events.append("shared"))
    found.shared_experts.register_full_backward_hook(lambda *_: events.append("shared"))
    results = []
    for mixture in (expected, found):
        hidden = torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()
        with (
            patch.object(_RowsUnderWay, "start", logged("start", events)),
            patch.object(_RowsUnderWay, "wait", logged("wait", events)),
        ):
            output = mixture(hidden)
            order["forward"] = events.copy()
            events.clear()
            output.square().sum().backward()
            order["backward"] = events.copy()
            events.clear()
        results.append(
            [output, hidden.grad, mixture.gate.weight.grad, *(p.grad for p in mixture.shared_experts.parameters())]
        )
    differences = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*results, strict=True)]
    return max(differences), order


def logged(event: str, events: list[str]) -> Callable[..., torch.Tensor]:
    """Return the method of _RowsUnderWay that also adds the event."""
    method = getattr(_RowsUnderWay, event)

    def call(*arguments: Any) -> torch.Tensor:
        events.append(event)
        return method(*arguments)

    return call


def main() -> None:
    disable_shm_comm()
    dist.init_process_group("gloo")
    for name, routing in CASES.items():
        for kind, flags in {"eager": (False, False), "captured": (True, False), "recomputed": (False, True)}.items():
            difference, rows = compare(routing, *flags)
            if dist.get_rank() == 0:
                print(f"EXPERTS {name}, {kind}: {difference:.1e} {rows}", flush=True)
    difference, order = compute_shared_experts()
    if dist.get_rank() == 0:
        print(
            f"SHARED {difference:.1e}",
            *(f"ORDER {name}: {' '.join(events)}" for name, events in order.items()),
            sep="\n",
        )
    dist.barrier()
    sys.stdout.flush()
    exit_without_cleanup()


if __name__ == "__main__":
    main()
