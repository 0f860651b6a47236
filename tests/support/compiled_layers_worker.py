"""Captures the decoder layers of every sliced layout on two ranks, and compares with layers that are not captured.

It prints one line for each layout: "LAYOUT <name> <graphs> <largest relative difference of a gradient>", and for each one with
divided experts "STEPS <name> <number of graphs after each of some steps>".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig

from longhaul.compat.deepspeed_ops import disable_shm_comm
from longhaul.config.stage_config import Parallel
from longhaul.runtime.process_rank import exit_without_cleanup
from longhaul.train.activation_checkpointing import apply_activation_checkpointing
from longhaul.train.batches import MicroBatch
from longhaul.train.compile_layers import compile_layers
from longhaul.train.experts_on_gpus import use_experts_for_gpus
from longhaul.train.loss import loss_sum
from longhaul.train.parallel.expert_load_balancing import ExpertLoad
from longhaul.train.parallel.parallel_dims import ParallelDims, build_parallel_dims
from longhaul.train.parallel.slice_model import build_sliced_model
from tests.parity.parity_cases import MODELS
from tests.support.backward_in_thread import backward_in_thread
from tests.support.tiny_model_sizes import tiny_stage

RANKS, LENGTH, STEPS = 2, 16, 5
LAYOUTS: dict[str, tuple[str, dict[str, int], str]] = {
    "tensor": ("llama", {"tensor": 2}, "none"),
    "tensor, latent attention": ("deepseek_v3", {"tensor": 2}, "none"),
    "tensor, recompute": ("qwen3", {"tensor": 2}, "full"),
    "expert": ("qwen3_moe", {"expert": 2}, "none"),
    "expert, recompute": ("deepseek_v3", {"expert": 2}, "full"),
    "sequence": ("llama", {"sequence": 2}, "none"),
    "sequence, experts": ("deepseek_v3", {"sequence": 2}, "selective"),
}


def gradients(name: str, captures: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the gradients of this rank's slices, and the load of its experts."""
    model_name, axes, checkpointing = LAYOUTS[name]
    dims = build_parallel_dims(Parallel(**axes), dist.get_rank(), RANKS)
    model = _build(model_name, dims)
    load = ExpertLoad(model, dims, tiny_stage(), torch.device("cpu"))
    apply_activation_checkpointing(model, checkpointing)
    if captures:
        use_experts_for_gpus(model)
        compile_layers(model, "aot_eager")
    engine, batch = _Engine(model), _batch(model, dims)
    backward_in_thread(loss_sum(engine, batch, dims).backward)
    found = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    return found, load.finish_step(torch.ones(()))


def graphs_after_steps(name: str) -> list[int]:
    """Return the number of graphs after each step; the tokens, and so the number of rows for each rank, are others in each."""
    import torch._dynamo

    model_name, axes, checkpointing = LAYOUTS[name]
    dims = build_parallel_dims(Parallel(**axes), dist.get_rank(), RANKS)
    model = _build(model_name, dims)
    apply_activation_checkpointing(model, checkpointing)
    use_experts_for_gpus(model)
    compile_layers(model, "aot_eager")
    engine, graphs = _Engine(model), list[int]()
    for step in range(STEPS):
        batch = _batch(model, dims, seed=RANKS * step + dist.get_rank())
        backward_in_thread(loss_sum(engine, batch, dims).backward)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return graphs


class _Engine(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.module(*arguments, **named)


def _build(name: str, dims: ParallelDims) -> Any:
    (kind, keys), *_ = MODELS[name].items()
    config = AutoConfig.for_model(kind, **keys, use_cache=False)
    config_of_zero = {"zero_optimization": {"stage": 1}}
    model = build_sliced_model(config, dims, False, torch.device("cpu"), config_of_zero)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05, generator=generator)
    if dims.parallel.sequence > 1:
        from longhaul.train.parallel.sequence_parallel import apply_sequence_parallel

        apply_sequence_parallel(model, dims)
    return model.train()


def _batch(model: Any, dims: ParallelDims, seed: int | None = None) -> MicroBatch:
    """Return two packed rows, of which this rank computes its tokens; random ones with a seed."""
    ids = torch.arange(2, 2 + 2 * LENGTH).view(2, LENGTH)
    if seed is not None:
        ids = ids.flatten()[torch.randint(ids.numel(), ids.shape, generator=torch.Generator().manual_seed(seed))]
    positions = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)]).repeat(2, 1)
    batch = MicroBatch(ids, ids + 1, positions)
    if dims.parallel.sequence == 1:
        return batch
    from longhaul.train.parallel.sequence_parallel import slice_tokens

    return slice_tokens(model, batch, dims)


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys() and len(found) > 10
    return max(((found[key] - expected[key]).abs().max() / expected[key].abs().max()).item() for key in expected)


def compare_layouts() -> Iterator[str]:
    import torch._dynamo

    for name in LAYOUTS:
        expected, expected_load = gradients(name, captures=False)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        found, load = gradients(name, captures=True)
        assert all(torch.equal(load[layer], expected_load[layer]) for layer in expected_load), name
        breaks = torch._dynamo.utils.counters["graph_break"]
        assert all("torch.compiler.disable" in reason for reason in breaks), (name, breaks)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        yield f"LAYOUT {name}: {graphs} graphs, {largest_difference(found, expected):.1e}"
        if "expert" in LAYOUTS[name][1]:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            yield f"STEPS {name}: {graphs_after_steps(name)}"


def main() -> None:
    disable_shm_comm()
    dist.init_process_group("gloo")
    for line in compare_layouts():
        if dist.get_rank() == 0:
            print(line, flush=True)
    dist.barrier()
    sys.stdout.flush()
    exit_without_cleanup()


if __name__ == "__main__":
    main()
