"""torch.compile captures every decoder layer without a break, in all layouts; `aot_eager` runs the graphs as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.config.stage_config import Parallel
from longhaul.errors import UserError
from longhaul.train.activation_checkpointing import apply_activation_checkpointing
from longhaul.train.compile_layers import compile_layers, compiles_layers, not_compiled_line
from longhaul.train.parallel.expert_load_balancing import ExpertLoad
from longhaul.train.parallel.parallel_dims import ParallelDims
from tests.parity.parity_cases import MODELS
from tests.support import compiled_layers_worker, compiled_zero3_worker
from tests.support.backward_in_thread import backward_in_thread
from tests.support.launch_ranks import launch_worker
from tests.support.tiny_model_sizes import tiny_stage

pytestmark = pytest.mark.usefixtures("dynamo")

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PACKED = torch.cat([torch.arange(10), torch.arange(6)]).repeat(2, 1)


def build(name: str) -> Any:
    (kind, keys), *_ = MODELS[name].items()
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **keys, use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    loss = model(input_ids=torch.arange(2, 34).view(2, 16), position_ids=PACKED).logits.logsumexp(-1).mean()
    backward_in_thread(loss.backward)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("llama", "none"), ("llama", "selective"), ("qwen3", "full"), ("qwen3_moe", "selective"), ("deepseek_v3", "full")],
)
def test_one_graph_per_kind_of_layer_gives_the_same_bits(name: str, checkpointing: str, dynamo: Any):
    plain, captured = build(name), build(name)
    expected_load, load = (
        ExpertLoad(model, ParallelDims(0, 1, Parallel()), tiny_stage(), CPU) for model in (plain, captured)
    )
    expected = gradients(plain)
    apply_activation_checkpointing(captured, checkpointing)
    compile_layers(captured, "aot_eager")
    found = gradients(captured)
    assert len(found) > 20 and all(torch.equal(found[key], expected[key]) for key in expected)
    assert dynamo["stats"]["unique_graphs"] == (2 if name == "deepseek_v3" else 1)
    expected_counts, counts = (counted.finish_step(torch.ones(())) for counted in (expected_load, load))
    assert counts.keys() == expected_counts.keys() and bool(counts) == ("experts" in str(list(found)))
    for layer, expected_E in expected_counts.items():
        assert expected_E.sum() == 2 * 16 * 2 and torch.equal(counts[layer], expected_E)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_a_checkpoint_around_a_part_that_is_not_captured_recomputes_compiled_code(name: str, dynamo: Any):
    """Expert parallelism has such a part. Captured in the forward pass, or not at all: torch says nothing."""
    plain, captured = build(name), build(name)
    expected = gradients(plain)
    for layer in captured.model.layers:
        if experts := getattr(layer.mlp, "experts", None):
            experts.breaks_graph, experts.compile_parts = True, lambda _compile_part: None
    apply_activation_checkpointing(captured, "full")
    compile_layers(captured, "aot_eager")
    found = gradients(captured)
    assert len(found) > 20 and all(torch.equal(found[key], expected[key]) for key in expected)
    # A mixture layer: before the mixture, its router, what follows the experts, what follows the mixture.
    assert dynamo["stats"]["unique_graphs"] == (5 if name == "deepseek_v3" else 4)
    assert dynamo["graph_break"] and all("torch.compiler.disable" in reason for reason in dynamo["graph_break"])
    kept = _kept_elements(captured)
    assert kept < _kept_elements(build(name)) / 3, "only the inputs of layers are kept"


def _kept_elements(model: Any) -> int:
    """Return the elements of the tensors, other than weights, that autograd keeps of the decoder layers for the backward pass."""
    weights, kept = {weight.data_ptr() for weight in model.parameters()}, 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if tensor.data_ptr() in weights else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.model(input_ids=torch.arange(2, 34).view(2, 16), position_ids=PACKED)
    return kept


def test_passes_without_gradients_are_not_compiled(dynamo: Any):
    model = build("llama")
    compile_layers(model, "aot_eager")
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(2, 18)[None])
    assert dynamo["stats"]["unique_graphs"] == 0


def test_every_sliced_layout_is_captured():
    worker = Path(compiled_layers_worker.__file__)
    done = launch_worker(worker, 2, environment={"TORCHDYNAMO_DISABLE": "0"}, timeout_s=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    lines = re.findall(r"LAYOUT (.*): (\d+) graphs, (\S+)", done.stdout)
    assert [name for name, _, _ in lines] == list(compiled_layers_worker.LAYOUTS)
    assert all(int(graphs) >= 1 and float(difference) <= 1e-5 for _, graphs, difference in lines), lines
    assert "without torch.compile" not in done.stdout
    # The number of rows that a rank gets differs in each step; torch makes graphs for any number at the second one.
    steps = [json.loads(graphs) for graphs in re.findall(r"STEPS .*: (\[.*\])", done.stdout)]
    assert len(steps) == 2 and all(len(graphs) == 5 and graphs[2] == graphs[4] for graphs in steps), steps


def test_zero_3_trains_captured_layers_to_the_same_bits():
    worker = Path(compiled_zero3_worker.__file__)
    done = launch_worker(worker, 2, environment={"TORCHDYNAMO_DISABLE": "0"}, timeout_s=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found = re.findall(r"EQUAL (\w+) \[.*\] (\d+)$", done.stdout, re.MULTILINE)
    assert found == [("none", "1"), ("selective", "1"), ("full", "1")], done.stdout
    assert "STILL WRONG" in done.stdout, "memory_efficient_linear need no longer be set (planning/deepspeed_config.py)"
    assert "without torch.compile" not in done.stdout


def test_a_layer_that_cannot_be_captured_is_named_and_runs(capsys: pytest.CaptureFixture[str]):
    plain, broken = build("llama"), build("llama")
    layer = broken.model.layers[1]
    usual = layer.mlp.forward

    def prints(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.sum().item() > 1e9:
            print("large")
        return usual(hidden)

    layer.mlp.forward = prints
    expected = gradients(plain)
    compile_layers(broken, "aot_eager")
    found = gradients(broken)
    assert all(torch.allclose(found[key], expected[key]) for key in expected)
    out = capsys.readouterr().out
    assert out.count("run without torch.compile") == 1 and "LlamaDecoderLayer 1" in out


def test_a_compiler_that_fails_ends_the_training_until_it_is_repaired_or_off():
    def fails(_graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("no C compiler")

    model = build("llama")
    compile_layers(model, fails)  # pyright: ignore
    with pytest.raises(UserError, match=r"torch.compile of LlamaDecoderLayer failed: .*no C compiler"):
        gradients(model)
    model = build("llama")
    compile_layers(model, lambda *_: (_ for _ in ()).throw(RuntimeError(f"{'x ' * 9000}cc1: no such file")))  # pyright: ignore
    with pytest.raises(UserError, match=r"failed: .* … .*cc1: no such file") as refused:
        gradients(model)
    assert len(refused.value.message) < 1500
    repaired, without = build("llama"), build("llama")
    compile_layers(repaired, "aot_eager")
    assert gradients(repaired) and gradients(without)


def test_only_gpus_compile_and_only_where_the_stage_allows_it():
    dense, mixture = build("llama"), build("qwen3_moe")
    assert compiles_layers(tiny_stage(), mixture, GPU) and not compiles_layers(tiny_stage(), mixture, CPU)
    assert not compiles_layers(tiny_stage(compile="off"), dense, GPU)
    assert not compiles_layers(tiny_stage(activation_checkpointing="offload"), dense, GPU)
    assert compiles_layers(tiny_stage(zero={"stage": 3}), dense, GPU)
    assert not compiles_layers(tiny_stage(zero={"stage": 3}), mixture, GPU)
    assert compiles_layers(tiny_stage(zero={"stage": 3}, activation_checkpointing="full"), dense, GPU)
    split = tiny_stage(zero={"stage": 3}, parallel={"tensor": 2}, gpus_per_node=2)
    assert not compiles_layers(split, dense, GPU)
    experts = {"parallel": {"expert": 2}, "gpus_per_node": 2}
    assert compiles_layers(tiny_stage(**experts, activation_checkpointing="full"), mixture, GPU)
    assert not compiles_layers(tiny_stage(**experts, activation_checkpointing="selective"), mixture, GPU)


def test_the_log_says_why_layers_are_not_compiled():
    offloads, dense = tiny_stage(activation_checkpointing="offload"), build("llama")
    assert not_compiled_line(offloads, dense, GPU) == (
        "decoder layers run without torch.compile: activation_checkpointing: offload moves the input of a layer to the CPU"
    )
    assert not_compiled_line(offloads, dense, CPU) is None and not_compiled_line(tiny_stage(), dense, GPU) is None
    assert not_compiled_line(tiny_stage(activation_checkpointing="offload", compile="off"), dense, GPU) is None
