"""The network with its first weights, and the DeepSpeed engine around it.

First weights come from the seed, from an earlier stage's checkpoint, or from a Hugging Face folder. All are filled in one
parameter at a time, by name, so that every layout starts from the same bits and ZeRO-3 never holds the whole model on
one rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

# The base class takes all of transformers' machinery with it: here, so that every rank has it before they meet.
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from longhaul.artifacts.files import read_json
from longhaul.artifacts.schemas import TokenizerManifest
from longhaul.checkpoint_io import open_master_weights
from longhaul.checkpoint_io.tensor_parts import Shard
from longhaul.config.model_size import geometry
from longhaul.config.pretrained_format import notes
from longhaul.errors import UserError
from longhaul.jobs.specs import TrainSpec
from longhaul.planning.gpu_memory import swap_param_elements
from longhaul.train.activation_checkpointing import recompute_layers
from longhaul.train.attention_kernels import repeat_shared_heads_in_fp32
from longhaul.train.checkpoint.resharding import write_masters
from longhaul.train.checkpoint.weights_folder import Start
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.parallel.slice_model import parameters, saved_buffers, split_model
from longhaul.train.pretrained_weights import pretrained_values
from longhaul.train.zero3_expert_memory import release_expert_weights

Shapes = dict[str, tuple[int, ...]]
Values = Callable[[Shard], torch.Tensor]


def build_model(
    job: TrainSpec, tokenizer: TokenizerManifest, start: Start | None, processes: DistributedContext
) -> PreTrainedModel:
    """A transformers causal LM in fp32 with its first weights; UserError when these do not fit the architecture."""
    ds_config = read_deepspeed_config(job, processes)
    repeat_shared_heads_in_fp32()
    if processes.is_main and job.pretrained and not start:
        for note in notes(read_json(Path(job.pretrained) / "config.json")):
            print(f"first weights: {note}", flush=True)
    if processes.dims.is_split:
        model = _split_model(job, tokenizer, start, processes, ds_config)
    else:
        config = _config(job, tokenizer)
        model = _from_config(job, config, ds_config)
        _fill(model, _first_values(job, config, _shapes(model), start), bool(start or job.pretrained))
    model.config.use_cache = False
    recompute_layers(model, job.stage.activation_checkpointing)
    if job.stage.zero.stage == 3 and job.stage.activation_checkpointing == "none":
        release_expert_weights(model)
    return model.train()


def read_deepspeed_config(job: TrainSpec, processes: DistributedContext | None = None) -> dict[str, Any]:
    """The rendered ds_config.json with this process' swap folder; the total batch follows from the world size."""
    found = json.loads(Path(job.deepspeed).read_text(encoding="utf-8"))
    if processes and processes.swap:
        zero = found["zero_optimization"]
        for key in job.stage.zero.on_disk:
            zero[key]["nvme_path"] = str(processes.swap)
        if "offload_param" in job.stage.zero.on_disk:
            zero["offload_param"]["buffer_size"] = swap_param_elements(geometry(job.model), processes.dims.data)
    return found


def _split_model(
    job: TrainSpec,
    tokenizer: TokenizerManifest,
    start: Start | None,
    processes: DistributedContext,
    ds_config: dict[str, Any],
) -> Any:
    """This rank's part of the model; its values are cut from one whole tensor after the other."""
    config = _config(job, tokenizer)
    model = split_model(config, processes.dims, job.trust_remote_code, processes.device, ds_config)
    _fill(model, _first_values(job, config, _all_shapes(model, processes), start), bool(start or job.pretrained))
    return model


def restore_first_masters(
    engine: Any, job: TrainSpec, tokenizer: TokenizerManifest, start: Start | None, processes: DistributedContext
) -> None:
    """Before the first step of half precision: the masters are the source's fp32 weights, which the model holds rounded."""
    if job.stage.precision == "fp32" or not (start or job.pretrained):
        return
    shapes = _all_shapes(engine.module, processes)
    write_masters(engine, _first_values(job, _config(job, tokenizer), shapes, start))


def _first_values(job: TrainSpec, config: Any, shapes: Shapes, start: Start | None) -> Values:
    """Where the weights begin: an earlier stage's masters, a Hugging Face folder, or the seed. `shapes` are the whole model's."""
    if start:
        return _checkpoint_values(shapes, start)
    if job.pretrained:
        return pretrained_values(Path(job.pretrained), shapes, config)
    whole = seeded_values(config, job.seed)
    return lambda shard: shard.cut(whole(shard.name, torch.Size(shard.shape)))


def _config(job: TrainSpec, tokenizer: TokenizerManifest) -> Any:
    if tokenizer.vocab_size > job.model["vocab_size"]:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens; the model's vocab_size is {job.model['vocab_size']}",
            f"set vocab_size to at least {tokenizer.vocab_size}",
        )
    keys = {**job.model, "use_cache": False}
    if not job.pretrained:
        keys |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return AutoConfig.for_model(**keys)


def _from_config(job: TrainSpec, config: Any, ds_config: dict[str, Any]) -> PreTrainedModel:
    # Imports the architecture: of a class that is first seen inside zero.Init, DeepSpeed takes away what decorators added.
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=job.trust_remote_code)
    # All values are filled in by name; under ZeRO-3 transformers would find nothing left to initialise.
    with no_init_weights(), _partitioning(job, ds_config):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=job.trust_remote_code
        )
    model.tie_weights()
    # zero.Init rounds every tensor that is made inside it to the compute precision, the rotary frequencies too.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(model.device)
    return model


def _partitioning(job: TrainSpec, ds_config: dict[str, Any]) -> AbstractContextManager[Any]:
    if job.stage.zero.stage < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.Init(config_dict_or_path=ds_config)


def seeded_values(config: Any, seed: int) -> Callable[[str, torch.Size], torch.Tensor]:
    """First values by name: ones for norms, zeros for biases, else a normal distribution with the config's deviation.

    Each parameter has its own generator, so that its values depend on nothing but the seed and its name.
    """

    def values(name: str, shape: torch.Size) -> torch.Tensor:
        if name.endswith(("bias", "e_score_correction_bias")):
            return torch.zeros(shape)
        if len(shape) < 2:
            return torch.ones(shape)
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.empty(shape).normal_(0.0, config.initializer_range, generator=generator)

    return values


def _checkpoint_values(shapes: Shapes, start: Start) -> Values:
    """Master weights of an earlier stage, whatever its layout was; `shapes` has all tensors of the model."""
    weights = open_master_weights(start.folder)
    if differing := sorted(set(weights) ^ set(shapes)):
        raise UserError(
            f"{start.folder} and the model differ in {', '.join(differing[:5])} ({len(differing)} in all)",
            "a stage starts from one with the same model",
        )
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise UserError(
                f"{start.folder}: {name} is {list(weights[name].shape)}, the model wants {list(shape)}",
                "a stage starts from one with the same model",
            )
    return lambda shard: shard.read(weights[shard.name])


def _shapes(model: Any) -> Shapes:
    """Name -> shape of the whole tensors of which this rank has parts."""
    return {shard.name: tuple(shard.shape) for shard, _ in [*parameters(model), *saved_buffers(model)]}


def _all_shapes(model: Any, processes: DistributedContext) -> Shapes:
    """The same of all ranks together."""
    return {name: shape for part in processes.gather(_shapes(model)) for name, shape in part.items()}


def _fill(model: Any, values: Values, buffers: bool) -> None:
    with torch.no_grad():
        for shard, parameter in parameters(model):
            with _whole(parameter):
                if _is_filled_here(parameter):
                    parameter.copy_(values(shard).to(parameter.dtype))
        for shard, buffer in saved_buffers(model) if buffers else ():
            buffer.copy_(values(shard))


def _is_filled_here(parameter: Any) -> bool:
    return not hasattr(parameter, "ds_id") or torch.distributed.get_rank(parameter.ds_process_group) == 0


def _whole(parameter: Any) -> AbstractContextManager[Any]:
    """ZeRO-3: the parameter gathered; its first rank's values are kept, so that no other rank reads any."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
