"""No operation of a forward and backward pass needs a number of the device on the CPU.

Such an operation lets the CPU wait for the GPU. On CPUs, torch dispatches the same operators.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.config.stage_config import Parallel
from longhaul.data.sampling.sample_format import Sample
from longhaul.train import experts_on_gpus
from longhaul.train.activation_checkpointing import apply_activation_checkpointing
from longhaul.train.batches import MicroBatch, collate
from longhaul.train.experts_on_gpus import use_experts_for_gpus
from longhaul.train.fp8_products import use_fp8_products
from longhaul.train.loss import loss_sum, scale_to_global_mean
from longhaul.train.parallel.expert_balance_loss import SequenceBalanceLoss
from longhaul.train.parallel.expert_load_balancing import ExpertLoad
from longhaul.train.parallel.parallel_dims import ParallelDims
from longhaul.train.parallel.pipeline_parallel import PipelineLayers, keep_own_layers
from tests.parity.parity_cases import MODELS
from tests.support.tiny_model_sizes import tiny_stage

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "is_nonzero"}
"""ATen operators whose result, or its size, the CPU reads from the device."""
ROWS = {"whole windows": [[*range(16)]] * 2, "packs with padding": [[*range(16)], [0, 1, 2, 0, 1, 2, 3, *range(-9, 0)]]}
CASES = [
    ("llama", "none", "bf16"),
    ("llama", "selective", "fp8"),
    ("qwen3_moe", "full", "bf16"),
    ("deepseek_v3", "none", "bf16"),
]


class WaitingOperators(TorchDispatchMode):
    """Collects the names of the operators that let the CPU wait."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING or func is torch.ops.aten.repeat_interleave.Tensor:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Rows:
    """Samples with given position ids."""

    length = 16

    def __init__(self, positions: list[list[int]]) -> None:
        self._positions = positions

    def fill(self, index: int, sample: Sample) -> int:
        sample.input_ids[:] = np.arange(2, 18) + index
        sample.labels[:], sample.position_ids[:] = sample.input_ids, self._positions[index]
        return sum(position >= 0 for position in self._positions[index])


class Engine:
    """Stands for DeepSpeed's engine: calls the model."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def one_product_per_row(rows_SI: torch.Tensor, weights_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Compute what `grouped_linear` does: its loop on CPUs reads the ends."""
    experts_S = torch.searchsorted(ends_E, torch.arange(len(rows_SI), dtype=torch.int32), right=True)
    return torch.einsum("si,soi->so", rows_SI, weights_EOI[experts_S])


def one_hot(values: torch.Tensor, classes: int) -> torch.Tensor:
    """Compute what torch's does: on CPUs it checks the values."""
    return (values[..., None] == torch.arange(classes)).long()


def micro_batch(rows: str) -> MicroBatch:
    samples: Any = Rows(ROWS[rows])
    return collate(samples, np.arange(2))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("name", "checkpointing", "precision"), CASES)
def test_a_step_reads_nothing_from_the_device(
    name: str, checkpointing: str, precision: str, rows: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(experts_on_gpus, "grouped_linear", one_product_per_row)
    monkeypatch.setattr(F, "one_hot", one_hot)
    ((kind, keys),) = MODELS[name].items()
    config = AutoConfig.for_model(kind, **keys, use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    apply_activation_checkpointing(model, checkpointing)
    use_experts_for_gpus(model)
    if precision == "fp8":
        use_fp8_products(model)
    dims, stage = ParallelDims(0, 1, Parallel()), tiny_stage(sequence_aux_loss_coef=0.1, router_bias_update_rate=0.1)
    load = ExpertLoad(model, dims, stage, torch.device("cpu"))
    job: Any = type("Job", (), {"stage": stage})
    balance = SequenceBalanceLoss(model, dims, job, torch.device("cpu"))
    batch, engine = micro_batch(rows), Engine(model)
    with WaitingOperators() as found:
        summed = loss_sum(engine, batch, dims)  # pyright: ignore[reportArgumentType]
        scale_to_global_mean(summed, torch.tensor(32.0), 1, 1).backward()
        load.finish_step(torch.ones(()))
        balance.pop_loss()
    assert not found.names


def test_documents_that_nobody_has_looked_for_are_read_from_the_device():
    """This is what the test above would find."""
    ((kind, keys),) = MODELS["llama"].items()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys, use_cache=False)).train()
    batch, engine = micro_batch("whole windows"), Engine(model)
    unknown = MicroBatch(batch.input_ids, batch.labels, batch.position_ids)
    with WaitingOperators() as found:
        expected = loss_sum(engine, unknown)  # pyright: ignore[reportArgumentType]
    assert found.names == ["_local_scalar_dense"]
    assert torch.equal(loss_sum(engine, batch), expected)  # pyright: ignore[reportArgumentType]


def test_layers_of_a_pipeline_need_not_read_positions_of_windows():
    ((kind, keys),) = MODELS["llama"].items()
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys, use_cache=False)).train()
    keep_own_layers(model, ParallelDims(0, 1, Parallel()))
    inputs, outputs = (torch.randn(2, 16, 64), torch.arange(16).repeat(2, 1)), []
    for known, expected in ((False, []), (None, ["_local_scalar_dense"])):
        with WaitingOperators() as found:
            outputs.append(PipelineLayers(model, True, known)(inputs))
        assert found.names == expected
    assert torch.equal(*outputs)


@pytest.mark.parametrize("rows", ROWS)
def test_known_documents_give_the_same_bits(rows: str):
    ((kind, keys),) = MODELS["llama"].items()
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys, use_cache=False)).train()
    known = micro_batch(rows)
    assert known.has_several_documents == (rows != "whole windows")
    unknown = MicroBatch(known.input_ids, known.labels, known.position_ids)
    losses = [loss_sum(Engine(model), batch) for batch in (known, unknown)]  # pyright: ignore[reportArgumentType]
    assert torch.equal(*losses)
