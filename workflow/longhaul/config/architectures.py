"""Model architectures: the Hugging Face config keys that shape a network, one model per architecture.

Field names and defaults are those of transformers' config classes (a test compares them), so that a config copied from a
model card works and a misspelt key is found at once. Sizes have no default: a wrong guess there costs a training.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from longhaul.config.field_types import FrozenModel, HubSource, OneLine, Share, Whole

Positive = Annotated[float, Field(gt=0)]
# Of widths, heads, experts, positions and rows; and of layers, which are counted one by one.
MAX_SIZE, MAX_LAYERS = 10**8, 10**4
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


class Decoder(FrozenModel):
    """Keys that every architecture shares."""

    vocab_size: Size = Field(description="Rows of the embedding; at least the tokenizer's size.")
    hidden_size: Size = Field(description="Width of the residual stream.")
    intermediate_size: Size = Field(description="Width of a dense MLP.")
    num_hidden_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = Field(description="Decoder layers.")
    num_attention_heads: Size = Field(description="Query heads.")
    num_key_value_heads: Size = Field(description="Key and value heads.")
    max_position_embeddings: Size = Field(description="Longest sequence the positions allow.")
    rope_theta: Positive = Field(default=10000.0, description="Base of the rotary embedding.")
    rope_scaling: dict[str, float | int | str | bool] | None = Field(
        default=None, description="Rotary scaling, e.g. yarn."
    )
    rms_norm_eps: Positive = Field(default=1e-6, description="Added inside RMSNorm.")
    initializer_range: Positive = Field(default=0.02, description="Standard deviation of initial weights.")
    tie_word_embeddings: bool = Field(default=False, description="Output head shares the embedding's weights.")
    attention_dropout: Share = Field(default=0.0, description="Dropout on attention weights.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Decoder:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        self._check_head_width()
        kind = (self.rope_scaling or {}).get("rope_type", (self.rope_scaling or {}).get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_scaling.rope_type is {kind!r}; use one of {', '.join(ROPE_TYPES)}")
        return self

    def _check_head_width(self) -> None:
        """Rotary embeddings turn pairs."""
        width = getattr(self, "head_dim", None)
        if width is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if (width or self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"heads are {width or self.hidden_size // self.num_attention_heads} wide; rotary embeddings need an even width"
            )


class Llama(Decoder):
    """Llama."""

    head_dim: Size | None = Field(default=None, description="Default: hidden_size / num_attention_heads.")
    attention_bias: bool = Field(default=False, description="Biases in the attention projections.")
    mlp_bias: bool = Field(default=False, description="Biases in the MLP.")


class Qwen2(Decoder):
    """Qwen2 and Qwen2.5."""


class Qwen3(Decoder):
    """Qwen3, dense."""

    head_dim: Size = Field(default=128, description="Width of one head.")
    attention_bias: bool = Field(default=False, description="Biases in the attention projections.")


class Qwen3Moe(Decoder):
    """Qwen3, mixture of experts."""

    head_dim: Size | None = Field(default=None, description="Default: hidden_size / num_attention_heads.")
    attention_bias: bool = Field(default=False, description="Biases in the attention projections.")
    moe_intermediate_size: Size = Field(description="Width of one expert.")
    num_experts: Size = Field(description="Routed experts of a layer.")
    num_experts_per_tok: Size = Field(description="Experts a token visits.")
    norm_topk_prob: bool = Field(default=False, description="Router weights of the chosen experts sum to 1.")
    decoder_sparse_step: Size = Field(default=1, description="Every n-th layer is a mixture.")
    mlp_only_layers: tuple[int, ...] = Field(default=(), description="Layers that stay dense.")

    @model_validator(mode="after")
    def _enough_experts(self) -> Qwen3Moe:
        _check_choice(self.num_experts_per_tok, "num_experts", self.num_experts)
        return self


class LatentAttention(Decoder):
    """Multi-head latent attention and experts, as in DeepSeek V2 and V3."""

    attention_bias: bool = Field(default=False, description="Biases in the attention projections.")
    moe_intermediate_size: Size = Field(description="Width of one expert.")
    n_routed_experts: Size = Field(description="Routed experts of a layer.")
    n_shared_experts: Size = Field(description="Experts every token visits.")
    num_experts_per_tok: Size = Field(description="Routed experts a token visits.")
    first_k_dense_replace: Whole = Field(description="Leading layers that stay dense.")
    q_lora_rank: Size | None = Field(description="Rank of the query compression; null: none.")
    kv_lora_rank: Size = Field(description="Rank of the key/value compression.")
    qk_nope_head_dim: Size = Field(description="Width of a head without positions.")
    qk_rope_head_dim: Size = Field(description="Width of a head with rotary positions.")
    v_head_dim: Size = Field(description="Width of a value head.")

    @model_validator(mode="after")
    def _enough_experts(self) -> LatentAttention:
        _check_choice(self.num_experts_per_tok, "n_routed_experts", self.n_routed_experts)
        return self

    def _check_head_width(self) -> None:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; rotary embeddings need an even width")


def _check_choice(chosen: int, key: str, experts: int) -> None:
    if chosen > experts:
        raise ValueError(f"num_experts_per_tok {chosen} is more than {key} {experts}")


class DeepseekV2(LatentAttention):
    """DeepSeek V2."""

    n_group: Size | None = Field(default=None, description="Expert groups; topk_method group_limited_greedy.")
    topk_group: Size | None = Field(default=None, description="Groups a token may choose from.")
    topk_method: OneLine = Field(default="greedy", description="greedy or group_limited_greedy.")
    norm_topk_prob: bool = Field(default=False, description="Router weights of the chosen experts sum to 1.")
    routed_scaling_factor: Positive = Field(default=1.0, description="Scale of the routed experts' output.")


class DeepseekV3(LatentAttention):
    """DeepSeek V3 and R1."""

    n_group: Size = Field(default=8, description="Expert groups.")
    topk_group: Size = Field(default=4, description="Groups a token may choose from.")
    norm_topk_prob: bool = Field(default=True, description="Router weights of the chosen experts sum to 1.")
    routed_scaling_factor: Positive = Field(default=2.5, description="Scale of the routed experts' output.")

    @model_validator(mode="after")
    def _groups_divide(self) -> DeepseekV3:
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts {self.n_routed_experts} is not a multiple of n_group {self.n_group}")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.topk_group > self.n_group or self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} cannot be chosen from topk_group {self.topk_group} of "
                f"n_group {self.n_group} groups ({reachable} experts)"
            )
        return self


class Pretrained(FrozenModel):
    """Weights to start from; exactly one of path and hub."""

    path: OneLine | None = Field(default=None, description="Hugging Face folder; relative to the config file.")
    hub: HubSource | None = Field(default=None, description="Take the weights from the hub.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that ships with the model.")

    @model_validator(mode="after")
    def _one_source(self) -> Pretrained:
        if bool(self.path) == bool(self.hub):
            raise ValueError("needs exactly one of path, hub")
        return self


class Model(FrozenModel):
    """Exactly one of these: the key names the architecture."""

    llama: Llama | None = Field(default=None, description="Llama.")
    qwen2: Qwen2 | None = Field(default=None, description="Qwen2 and Qwen2.5.")
    qwen3: Qwen3 | None = Field(default=None, description="Qwen3, dense.")
    qwen3_moe: Qwen3Moe | None = Field(default=None, description="Qwen3, mixture of experts.")
    deepseek_v2: DeepseekV2 | None = Field(default=None, description="DeepSeek V2.")
    deepseek_v3: DeepseekV3 | None = Field(default=None, description="DeepSeek V3 and R1.")
    pretrained: Pretrained | None = Field(default=None, description="Start from existing weights.")

    @model_validator(mode="after")
    def _one_model(self) -> Model:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"needs exactly one of {', '.join(type(self).model_fields)}; found {found}")
        return self

    def config_dict(self) -> dict[str, Any]:
        """The Hugging Face config of a model built here, as config.json would hold it; empty for a pretrained one."""
        if self.pretrained:
            return {}
        architecture, decoder = next((name, value) for name, value in self if value is not None)
        keys = decoder.model_dump(mode="json")
        rope = {"rope_type": "default", **(keys.pop("rope_scaling") or {}), "rope_theta": keys.pop("rope_theta")}
        if keys.get("head_dim", 0) is None:
            keys["head_dim"] = keys["hidden_size"] // keys["num_attention_heads"]
        if architecture.startswith("deepseek"):
            keys["head_dim"] = keys["qk_rope_head_dim"]
        return {"model_type": architecture, **keys, "rope_parameters": rope}
