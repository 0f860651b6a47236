"""Builds the network of a stage from its Hugging Face config, on the GPU or the CPU; checks its rotary embedding."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch

# The base class imports all of transformers' machinery. Here, every rank has it before the ranks meet.
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.artifacts.atomic_files import read_json
from longhaul.compat.transformers import repeat_shared_heads_in_fp32
from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.model_size import model_size
from longhaul.config.pretrained_format import DAMAGED_PRETRAINED_HINT, pretrained_changes
from longhaul.config.rotary_embedding import rotary_numbers
from longhaul.errors import InputError
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.activation_checkpointing import apply_activation_checkpointing
from longhaul.train.checkpoint.weights_identity import StartingCheckpoint
from longhaul.train.compile_layers import compile_layers, compiles_layers, not_compiled_line
from longhaul.train.deepspeed_engine import read_deepspeed_config
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.experts_on_gpus import use_experts_for_gpus
from longhaul.train.fp8_products import check_fp8_hardware, use_fp8_products
from longhaul.train.free_gathered_experts import release_expert_weights
from longhaul.train.initial_weights import all_shapes, fill_weights, initial_values, own_shapes
from longhaul.train.packed_attention import can_skip_pairs, use_packed_attention
from longhaul.train.parallel.slice_model import build_sliced_model

# fp32 in transformers against fp64 here: powers of theta differ by about 1e-6.
_ROTARY_TOLERANCE = 1e-4
_ROTARY_HINT = "use the tested version of transformers, or correct the keys rope_scaling and rope_theta of the model"


def build_model(
    job: TrainSpec, tokenizer: TokenizerManifest, start: StartingCheckpoint | None, context: DistributedContext
) -> PreTrainedModel:
    """Return a transformers causal LM in fp32 with its initial weights, or this rank's slices of one.

    Raises:
        UserError: the tokenizer or the initial weights do not fit the architecture.
    """
    repeat_shared_heads_in_fp32()
    if context.is_main and job.pretrained and not start:
        for change in pretrained_changes(read_json(Path(job.pretrained) / "config.json", DAMAGED_PRETRAINED_HINT)):
            print(f"pretrained weights: {change}", flush=True)
    config = build_model_config(job, tokenizer)
    model = _build_network(job, config, context)
    train_every_embedding(model)
    check_rotary_embedding(model, job.model)
    shapes = all_shapes(model, context) if context.dims.is_sliced else own_shapes(model)
    values = initial_values(job, config, shapes, start, context.device)
    fill_weights(model, values, with_buffers=bool(start or job.pretrained))
    model.config.use_cache = False
    apply_activation_checkpointing(model, job.stage.activation_checkpointing)
    if context.device.type == "cuda" and job.stage.compile == "auto":
        use_experts_for_gpus(model)
    if job.stage.precision == "fp8":
        check_fp8_hardware(context.device)
        used = use_fp8_products(model)
        if context.is_main:
            print(used, flush=True)
    if job.stage.zero.stage == 3 and job.stage.activation_checkpointing == "none":
        release_expert_weights(model)
    if compiles_layers(job.stage, model, context.device):
        if can_skip_pairs(job.stage, model_size(job.model), model):
            use_packed_attention(model)
        compile_layers(model)
    elif context.is_main and (line := not_compiled_line(job.stage, model, context.device)):
        print(line, flush=True)
    return model.train()


def build_model_config(job: TrainSpec, tokenizer: TokenizerManifest) -> PreTrainedConfig:
    """Return the Hugging Face config of the stage's model; UserError when the vocabulary is too small for the tokenizer."""
    if tokenizer.vocab_size > job.model["vocab_size"]:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens; the model's vocab_size is {job.model['vocab_size']}",
            f"set vocab_size to at least {tokenizer.vocab_size}",
        )
    keys = {**job.model, "use_cache": False}
    if not job.pretrained:
        keys |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return AutoConfig.for_model(**keys)


def _build_network(job: TrainSpec, config: PreTrainedConfig, context: DistributedContext) -> PreTrainedModel:
    """Return the network with undefined values."""
    ds_config = read_deepspeed_config(job, context)
    if context.dims.is_sliced:
        return build_sliced_model(config, context.dims, job.trust_remote_code, context.device, ds_config)
    # Imports the architecture. DeepSpeed removes what decorators added to a class that is first imported inside zero.Init.
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=job.trust_remote_code)
    # All values are filled in by name; under ZeRO 3 transformers would find only empty tensors to initialise.
    with no_init_weights(), _partitioning(job, ds_config), place_of_fp32_weights(job, context.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=job.trust_remote_code
        )
    model.tie_weights()
    # zero.Init rounds every tensor that is made inside it to the compute precision, also the rotary frequencies.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(model.device)
    return model


def train_every_embedding(model: torch.nn.Module) -> None:
    """Let the embedding of every token learn, also that of the padding token: torch gives it no gradient.

    Many tokenizers have no padding token of their own, and use EOS instead, whose embedding must learn. Padding itself changes
    no gradient: no text attends to it, and it has no labels.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None


def place_of_fp32_weights(job: TrainSpec, device: torch.device) -> AbstractContextManager[object]:
    """Return the context to build a whole model in: the GPU if the fp32 weights fill at most half of it, else the CPU.

    DeepSpeed moves the weights to the GPU in either case, after it has rounded them to the precision of the stage. ZeRO 3
    chooses the place itself.
    """
    zero = job.stage.zero
    if device.type != "cuda" or zero.stage == 3 or zero.offload_optimizer != "none":
        return nullcontext()
    memory_bytes = torch.cuda.get_device_properties(device).total_memory
    return device if 4 * model_size(job.model).total <= memory_bytes / 2 else nullcontext()


def check_rotary_embedding(model: PreTrainedModel, keys: HuggingFaceConfig) -> None:
    """Compare the network's rotary embedding with the formulas for the keys of its Hugging Face config.

    Raises:
        UserError: they differ, because this transformers release reads a key in another way, or ignores it.
    """
    sizes = {key: value for key, value in model.config.to_dict().items() if not key.startswith("rope_")}
    asked = rotary_numbers({**sizes, **keys})
    network = cast(Any, model)
    rotary = network.model.rotary_emb
    found = rotary.inv_freq.detach().double().cpu()
    expected = torch.tensor(asked.inverse_frequencies, dtype=torch.float64)
    differ = found.shape != expected.shape or not torch.allclose(found, expected, rtol=_ROTARY_TOLERANCE, atol=0.0)
    scales = {"attention scale": (rotary.attention_scaling, asked.attention_scale)}
    for module in network.modules():
        if hasattr(module, "qk_head_dim") and hasattr(module, "scaling"):
            scales["softmax scale"] = (module.scaling, asked.softmax_scale * module.qk_head_dim**-0.5)
    for name, (value, right) in scales.items():
        if not math.isclose(value, right, rel_tol=_ROTARY_TOLERANCE):
            raise InputError(
                f"the network's rotary {name} is {value:g}; the model's config asks for {right:g}", _ROTARY_HINT
            )
    if differ:
        raise InputError(
            "the network's rotary frequencies are not those that the model's config asks for", _ROTARY_HINT
        )


def _partitioning(job: TrainSpec, ds_config: dict[str, Any]) -> AbstractContextManager[object]:
    """Return the context in which ZeRO 3 partitions every parameter as soon as it is made."""
    if job.stage.zero.stage < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.Init(config_dict_or_path=ds_config)
