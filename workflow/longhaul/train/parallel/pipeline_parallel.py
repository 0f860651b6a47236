"""Pipeline parallelism: stages of consecutive decoder layers in DeepSpeed's PipelineModule, which runs 1F1B over them.

A stage's module works on (hidden states [B, S, H], position ids [B, S]); the first takes ids in the place of hidden
states, the last gives what the head works on, as the head is the loss's, which never has logits whole. Between embedding
and head a stage is one module, so that mask and rotary embedding are made once in each. Parallelism inside a stage is applied
to the Hugging Face layers before they come here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from longhaul.config.model_size import stage_layers
from longhaul.train.parallel.parallel_dims import ParallelDims


def keep_own_stage(model: Any, dims: ParallelDims) -> None:
    """Drops the layers of other stages; tied weights stay at both ends."""
    own = stage_layers(len(model.model.layers), dims.parallel.pipeline)[dims.stage]
    tied = model.config.tie_word_embeddings
    model.model.layers = torch.nn.ModuleDict({str(index): model.model.layers[index] for index in own})
    if dims.stage > 0 and not (tied and dims.is_last_stage):
        model.model.embed_tokens = None
    if not dims.is_last_stage:
        model.model.norm = model.lm_head = None


def as_pipeline(
    model: Any, dims: ParallelDims, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> PipelineModule:
    """The PipelineModule of a model that went through `keep_own_stage`."""
    parallel = dims.parallel
    if model.config.tie_word_embeddings:
        embed = TiedLayerSpec("embed", Embedding, model, tied_weight_attr="weight")
        head = TiedLayerSpec("embed", Embedding, model, forward_fn=_as_it_is, tied_weight_attr="weight")
    else:
        embed, head = LayerSpec(Embedding, model), LayerSpec(Head, model)
    stages = [LayerSpec(Stage, model, stage == parallel.pipeline - 1) for stage in range(parallel.pipeline)]
    return PipelineModule(
        layers=[embed, *stages, head],
        topology=PipeModelDataParallelTopology(parallel.pipeline, parallel.tensor, dims.data),
        loss_fn=loss,
        partition_method="type:^Stage$",
    )


class Embedding(torch.nn.Module):
    """(ids [B, S], positions) -> (hidden [B, S, H], positions)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens = model.model.embed_tokens

    @property
    def weight(self) -> torch.Tensor:
        """What the head shares."""
        return self.embed_tokens.weight

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, positions = inputs
        return self.embed_tokens(ids), positions


class Stage(torch.nn.Module):
    """The decoder layers of one stage, and the final norm in the last one, which drops the positions."""

    def __init__(self, model: Any, is_last: bool) -> None:
        super().__init__()
        self.layers, self.norm = model.model.layers, model.model.norm if is_last else None
        # A list hides it from the module tree: it holds no state of its own.
        self._shared = [model.model.rotary_emb, model.config]

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> Any:
        from transformers.masking_utils import create_causal_mask

        hidden, positions = inputs
        rotary, config = self._shared
        mask = create_causal_mask(
            config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions
        )
        angles = rotary(hidden, position_ids=positions)
        for layer in self.layers.values():
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=None,
                use_cache=False,
                position_embeddings=angles,
            )
        return (hidden, positions) if self.norm is None else self.norm(hidden)


class Head(torch.nn.Module):
    """Holds the head's weight for the optimizer; hidden [B, S, H] passes through to the loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.lm_head = model.lm_head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def _as_it_is(_embedding: Embedding, hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def hugging_face_name(name: str) -> str:
    """The model's name of a parameter of a PipelineModule.

    There it is `<position>.layers.5.…`, `<position>.lm_head.…` or, of a tied embedding, `tied_modules.embed.embed_tokens.…`.
    """
    parts = name.removeprefix("tied_modules.").split(".")[1:]
    return ".".join(parts if parts[0] == "lm_head" else ["model", *parts])
