"""Pipeline parallelism: divides decoder layers over ranks in DeepSpeed's PipelineModule (1F1B), with embedding and head.

A pipeline rank is one module between embedding and head, so that the attention mask and the rotary embedding are computed
once on each rank. Pipeline ranks pass on (hidden states [B, S, H], position ids [B, S]). The first rank gets token ids in the
place of hidden states. The last rank returns the input of the head: the loss applies the head itself and never builds whole
logits. The other parallel axes slice the Hugging Face layers before this module uses them.

B samples, S tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from longhaul.compat.transformers import known_documents
from longhaul.planning.layers_per_pipeline_rank import layers_per_pipeline_rank
from longhaul.train.parallel.parallel_dims import ParallelDims


def keep_own_layers(model: Any, dims: ParallelDims) -> None:
    """Remove the layers of other pipeline ranks; a tied weight stays on the first and on the last rank."""
    own = layers_per_pipeline_rank(len(model.model.layers), dims.parallel.pipeline)[dims.pipeline_rank]
    tied = model.config.tie_word_embeddings
    model.model.layers = torch.nn.ModuleDict({str(index): model.model.layers[index] for index in own})
    if dims.pipeline_rank > 0 and not (tied and dims.is_last_pipeline_rank):
        model.model.embed_tokens = None
    if not dims.is_last_pipeline_rank:
        model.model.norm = model.lm_head = None


def build_pipeline_module(
    model: Any,
    dims: ParallelDims,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    has_several_documents: bool | None = None,
) -> PipelineModule:
    """Return the PipelineModule of a model that `keep_own_layers` has reduced.

    loss: (hidden states [B, S, H], labels [B, S]) -> scalar
    has_several_documents: whether any row holds several documents; None: each rank asks the position ids of each micro batch
    """
    parallel = dims.parallel
    if model.config.tie_word_embeddings:
        embed = TiedLayerSpec("embed", PipelineEmbedding, model, tied_weight_attr="weight")
        head = TiedLayerSpec("embed", PipelineEmbedding, model, forward_fn=_pass_through, tied_weight_attr="weight")
    else:
        embed, head = LayerSpec(PipelineEmbedding, model), LayerSpec(PipelineHead, model)
    blocks = [
        LayerSpec(PipelineLayers, model, rank == parallel.pipeline - 1, has_several_documents)
        for rank in range(parallel.pipeline)
    ]
    return PipelineModule(
        layers=[embed, *blocks, head],
        topology=PipeModelDataParallelTopology(parallel.pipeline, parallel.tensor, dims.data),
        loss_fn=loss,
        partition_method=f"type:^{PipelineLayers.__name__}$",
    )


class PipelineEmbedding(torch.nn.Module):
    """(ids [B, S], positions [B, S]) -> (hidden states [B, S, H], positions)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens = model.model.embed_tokens

    @property
    def weight(self) -> torch.Tensor:
        """The weight that a tied head shares."""
        return self.embed_tokens.weight

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, positions = inputs
        return self.embed_tokens(ids), positions


class PipelineLayers(torch.nn.Module):
    """The decoder layers of one pipeline rank; on the last one also the final norm, after which positions are dropped.

    has_several_documents: as in `build_pipeline_module`
    """

    def __init__(self, model: Any, is_last: bool, has_several_documents: bool | None) -> None:
        super().__init__()
        self._has_several_documents = has_several_documents
        self.layers, self.norm = model.model.layers, model.model.norm if is_last else None
        # A list hides the rotary embedding from the module tree: it has no state of its own to save.
        self._rotary_and_config = [model.model.rotary_emb, model.config]

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> Any:
        from transformers.masking_utils import create_causal_mask

        hidden, positions = inputs
        rotary, config = self._rotary_and_config
        with known_documents(self._has_several_documents):
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


class PipelineHead(torch.nn.Module):
    """Holds the head's weight for the optimizer; returns the hidden states [B, S, H] unchanged, for the loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.lm_head = model.lm_head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def _pass_through(_embedding: PipelineEmbedding, hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def hugging_face_name_in_pipeline(name: str) -> str:
    """Return transformers' name of a parameter of a PipelineModule.

    PipelineModule names it `<position>.layers.5.…`, `<position>.lm_head.…` or, for a tied embedding,
    `tied_modules.embed.embed_tokens.…`.
    """
    parts = name.removeprefix("tied_modules.").split(".")[1:]
    return ".".join(parts if parts[0] == "lm_head" else ["model", *parts])
