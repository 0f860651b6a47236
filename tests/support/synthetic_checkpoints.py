"""Writes checkpoints of models that are too large to train here, as DeepSpeed 0.19 does. They serve to measure memory and speed.

They are ZeRO stage 3 over several ranks, or ZeRO stage 1 of a model that is split over pipeline, tensor and expert ranks.
Parameter groups are as in training: weights that decay, weights that do not, and experts. The files hold fp32 master weights
and optionally Adam's moments. Each rank repeats one random vector; every tensor is another part of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from longhaul.checkpoint_io import open_master_weights
from longhaul.config.stage_config import Parallel
from longhaul.export.model_without_memory import meta_model
from longhaul.train.checkpoint.checkpoint_folders import reference_folder
from longhaul.train.parallel.parallel_dims import build_parallel_dims
from longhaul.train.parallel.slice_index import write_slice_index
from longhaul.train.parallel.slice_model import slice_model

TAG = "step-00000002"


def llama_config(layers: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    """Return the config.json of a Llama. Heads have 64 channels, four share keys, the MLP is four times as wide as hidden."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}


def mixture_config(layers: int, hidden: int, experts: int, vocabulary: int) -> dict[str, Any]:
    """Return the config.json of a Qwen3 mixture of experts. Heads have 64 channels, four share keys; experts are 2/3 as wide."""
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=2 * hidden // 3,
        num_experts=experts,
        num_experts_per_tok=2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        head_dim=64,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return {**config.to_dict(), "architectures": ["Qwen3MoeForCausalLM"]}


def write_checkpoint(weights: Path, config: dict[str, Any], ranks: int, moments: bool) -> Path:
    """Write `weights`/checkpoints/<TAG> and model_config.json, and return the former. moments: write Adam's moments, too."""
    folder = _new_folder(weights, config)
    shapes = {name: parameter.shape for name, parameter in meta_model(config).named_parameters()}
    groups = [
        OrderedDict((name, shape) for name, shape in shapes.items() if (len(shape) > 1) is decays)
        for decays in (True, False)
    ]
    for rank in range(ranks):
        torch.save(_model_states(shapes, groups, ranks), folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save(
            {"optimizer_state_dict": _optimizer_state(groups, rank, ranks, moments), "ds_version": "0.19.8"}, path
        )
    return folder


def write_sliced_checkpoint(weights: Path, config: dict[str, Any], parallel: Parallel, world_size: int) -> Path:
    """Write a checkpoint of a model that the trainer's own code splits over `world_size` ranks, without moments."""
    folder = _new_folder(weights, config)
    entries: list[Any] = []

    def gather(own: Any) -> list[Any]:
        entries.append(own)
        return entries

    for rank in reversed(range(world_size)):  # rank 0 comes last: it writes the entries of all ranks
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        dims = build_parallel_dims(parallel, rank, world_size)
        model = slice_model(AutoConfig.for_model(**config), dims)
        write_slice_index(SimpleNamespace(module=model), dims, folder, is_tied=False, gather=gather)
        dist.destroy_process_group()
        groups = _split_groups(model)
        if dims.data_rank == 0:
            torch.save(_model_states({}, groups, dims.data), folder / f"mp_rank_{dims.model_rank:02d}_model_states.pt")
        shared_by = [dims.data, dims.data, dims.data // parallel.expert]
        state = {
            "zero_stage": 1,
            "partition_count": shared_by,
            "single_partition_of_fp32_groups": [
                _values(math.ceil(sum(map(math.prod, group.values())) / ranks), seed=10 * rank + index)
                for index, (group, ranks) in enumerate(zip(groups, shared_by, strict=True))
            ],
        }
        path = folder / f"bf16_zero_pp_rank_{dims.data_rank}_mp_rank_{dims.model_rank:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_version": "0.19.8"}, path)
    return folder


def _new_folder(weights: Path, config: dict[str, Any]) -> Path:
    folder = weights / "checkpoints" / TAG
    folder.mkdir(parents=True)
    (weights / "model_config.json").write_text(json.dumps(config))
    return folder


def _split_groups(model: torch.nn.Module) -> list[OrderedDict[str, torch.Size]]:
    """Return a rank's parameter groups: weights that decay, weights that do not, experts."""
    groups: list[OrderedDict[str, torch.Size]] = [OrderedDict() for _ in range(3)]
    for name, parameter in model.named_parameters():
        groups[2 if hasattr(parameter, "group_name") else int(parameter.dim() < 2)][name] = parameter.shape
    return groups


def _model_states(shapes: dict[str, torch.Size], groups: list[Any], ranks: int) -> dict[str, Any]:
    return {
        "module": OrderedDict((name, torch.zeros(0)) for name in shapes),
        "buffer_names": [],
        "param_shapes": groups,
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "optimizer": None,
        "ds_config": {},
        "ds_version": "0.19.8",
        "dp_world_size": ranks,
        "mp_world_size": 1,
    }


def _optimizer_state(groups: list[Any], rank: int, ranks: int, moments: bool) -> dict[str, Any]:
    sizes = [sum(math.ceil(shape.numel() / ranks) for shape in group.values()) for group in groups]

    def vectors(kind: int) -> list[torch.Tensor]:
        return [_values(numel, seed=100 * kind + 10 * rank + index) for index, numel in enumerate(sizes)]

    state = {}
    if moments:
        pairs = zip(vectors(1), vectors(2), strict=True)
        state = {
            index: {"step": torch.tensor(2.0), "exp_avg": first, "exp_avg_sq": second.abs_()}
            for index, (first, second) in enumerate(pairs)
        }
    return {
        "zero_stage": 3,
        "partition_count": ranks,
        "fp32_flat_groups": vectors(0),
        "optimizer_state_dict": {"state": state, "param_groups": [{} for _ in groups]},
    }


def _values(numel: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(1_000_003, generator=generator).mul_(0.02)  # a prime length, so all rows of a weight differ
    return vector.repeat(-(-numel // vector.numel()))[:numel].clone()


def write_reference_values(weights: Path, config: dict[str, Any]) -> None:
    """Write what the trainer writes with a checkpoint: hashes, and logits of the whole model in fp32 on one thread."""
    folder = weights / "checkpoints" / TAG
    reference = reference_folder(folder)
    reference.mkdir()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    state, entries = {}, {}
    for name, master in open_master_weights(folder).items():
        state[name] = master.read()
        hashes = [hashlib.sha256(_bytes(value)).hexdigest() for value in (state[name], state[name].bfloat16())]
        entries[name] = {"shape": list(master.shape), "sha256_fp32": hashes[0], "sha256_export": hashes[1]}
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    ids = torch.randint(3, config["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in ids])
    torch.set_num_threads(threads)
    save_file({"input_ids": ids, "logits": logits}, reference / "logits.safetensors")
    conditions = {"device": "cpu", "threads": 1, "dtype": "fp32", "torch": torch.__version__}
    (reference / "logits.json").write_text(json.dumps(conditions))
    (reference / "prompts.json").write_text(json.dumps({"split": "validation", "input_ids": ids[:, :8].tolist()}))
    (reference / "tensors.json").write_text(json.dumps(entries))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).flatten().numpy())
