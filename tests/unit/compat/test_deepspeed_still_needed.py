"""Each function of compat/deepspeed.py is still needed. A failing test means that DeepSpeed has changed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.moe.layer import MoE
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups

from longhaul.compat.deepspeed import (
    deepspeed_moe_class,
    mark_as_autoep_expert,
    register_expert_groups,
    unpartitioned_shape,
)


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        torch.nn.Module.__init__(self)


@pytest.fixture
def clear_expert_groups() -> Iterator[None]:
    yield
    groups._EXPERT_PARALLEL_GROUP.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP.clear()


def test_expert_groups_are_registered_only_in_private_dicts(clear_expert_groups: None) -> None:
    expert, expert_data = object(), object()
    register_expert_groups("ep_size_2", expert, expert_data)
    assert groups._get_expert_parallel_group("ep_size_2") is expert
    assert groups._get_expert_data_parallel_group("ep_size_2") is expert_data
    assert not [name for name in dir(groups) if "expert" in name and "group" in name and not name.startswith("_")]


def test_zero_1_and_2_recognise_experts_only_by_the_class_moe() -> None:
    experts = deepspeed_moe_class(Experts)()
    assert isinstance(experts, MoE) and isinstance(experts, Experts)
    assert experts.num_local_experts == 0 and list(experts.parameters()) == []
    assert "isinstance(module, MoE)" in inspect.getsource(DeepSpeedEngine._configure_distributed_model)
    assert "module.num_local_experts" in inspect.getsource(DeepSpeedEngine._save_moe_checkpoint)


def test_zero_3_refuses_the_class_moe() -> None:
    model = torch.nn.ModuleList([deepspeed_moe_class(Experts)()])
    with pytest.raises(AssertionError, match="MoE is not supported with ZeRO Stage 3"):
        DeepSpeedEngine._validate_zero3_moe_compatibility(SimpleNamespace(has_moe_layers=True, module=model))


def test_zero_3_recognises_experts_only_by_the_marks_of_autoep() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    mark_as_autoep_expert(parameter, "ep_size_2", None)
    source = inspect.getsource(DeepSpeedEngine._resolve_zero3_param_placement)
    assert f'"{parameter.ds_zero_placement_family}"' in source
    assert all(name in source for name in vars(parameter) if name.startswith("ds_zero"))


def test_zero_3_partitions_single_parameters_only_by_a_private_method() -> None:
    init = deepspeed.zero.Init
    assert "module.parameters(recurse=True)" in inspect.getsource(init.__init__)
    assert "param_list" in inspect.signature(init._convert_to_zero_parameters).parameters
    assert not [name for name in vars(init) if not name.startswith("_") and "convert" in name]


def test_the_shape_before_partitioning_is_an_undocumented_attribute() -> None:
    whole, partitioned = torch.zeros(2, 3), torch.zeros(0)
    partitioned.ds_shape = torch.Size([4, 5])
    assert unpartitioned_shape(whole) == (2, 3)
    assert unpartitioned_shape(partitioned) == (4, 5)
    assert "param.ds_shape = param.shape" in inspect.getsource(deepspeed.runtime.zero.partition_parameters)
