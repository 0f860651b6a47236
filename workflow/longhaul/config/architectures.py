"""Keys of section `model`: one class per model family (Llama, Qwen2, Qwen3, Qwen3-MoE, DeepSeek V2 and V3), or `pretrained`.

Field names and defaults equal those of the config classes in transformers; a test compares them. A config from a model card
therefore works, and a misspelt key is reported at once. Sizes have no default, because a wrong default would waste a training.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longhaul.config.field_types import Fraction, FrozenModel, HubSource, HuggingFaceConfig, NonNegativeInt, SingleLine
from longhaul.config.rotary_embedding import NEW_MODEL_TYPES, check_rope, rope_parameters

PositiveFloat = Annotated[float, Field(gt=0, le=1e12)]
# Upper limits of widths, heads, experts, positions and vocabulary, and of the number of layers: the plan loops over layers.
MAX_SIZE, MAX_LAYERS = 10**8, 10**4
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]


class Decoder(FrozenModel):
    """Keys that all architectures have."""

    vocab_size: Size = Field(description="Rows of the embedding. At least the vocabulary size of the tokenizer.")
    hidden_size: Size = Field(description="Width of the residual stream.")
    intermediate_size: Size = Field(description="Inner width of a dense MLP.")
    num_hidden_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = Field(description="Number of decoder layers.")
    num_attention_heads: Size = Field(description="Number of query heads.")
    num_key_value_heads: Size = Field(description="Number of key and value heads.")
    max_position_embeddings: Size = Field(description="Longest sequence length, in tokens.")
    rope_theta: PositiveFloat = Field(default=10000.0, description="Base of the rotary embedding.")
    rope_scaling: dict[str, float | int | str | bool] | None = Field(
        default=None,
        description="Scaling of the rotary embedding: rope_type (default, linear, yarn or llama3) and the keys of that type, "
        "with transformers' names.",
    )
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)] = Field(default=1e-6, description="Epsilon of RMSNorm.")
    initializer_range: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.02, description="Standard deviation of the initial weights."
    )
    tie_word_embeddings: bool = Field(default=False, description="The output head uses the weights of the embedding.")
    attention_dropout: Fraction = Field(default=0.0, description="Dropout probability of attention weights.")

    @model_validator(mode="after")
    def _check_heads(self) -> Decoder:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        self._check_head_width()
        keys = self.model_dump()
        check_rope(keys)
        kind = rope_parameters(keys).get("rope_type", "default")
        if kind not in NEW_MODEL_TYPES:
            raise ValueError(
                f"rope_scaling.rope_type {kind} is not for new models; use one of {', '.join(NEW_MODEL_TYPES)}"
            )
        return self

    def _check_head_width(self) -> None:
        """Raise ValueError for an odd head width: rotary embeddings rotate pairs of elements."""
        width = getattr(self, "head_dim", None)
        if width is None:
            self._check_equal_heads()
        if (width or self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"the head width is {width or self.hidden_size // self.num_attention_heads}; rotary embeddings need an even width"
            )

    def _check_equal_heads(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )


class Llama(Decoder):
    """Llama."""

    head_dim: Size | None = Field(
        default=None, description="Width of one head; null: hidden_size / num_attention_heads."
    )
    attention_bias: bool = Field(default=False, description="Attention projections have biases.")
    mlp_bias: bool = Field(default=False, description="MLP projections have biases.")

    def _check_head_width(self) -> None:
        super()._check_head_width()
        self._check_equal_heads()  # transformers' class requires it, also where head_dim is set


class Qwen2(Decoder):
    """Qwen2 and Qwen2.5."""


class Qwen3(Decoder):
    """Qwen3 without routed experts."""

    head_dim: Size = Field(default=128, description="Width of one head.")
    attention_bias: bool = Field(default=False, description="Attention projections have biases.")


class Qwen3Moe(Decoder):
    """Qwen3 with routed experts (mixture of experts)."""

    head_dim: Size | None = Field(
        default=None, description="Width of one head; null: hidden_size / num_attention_heads."
    )
    attention_bias: bool = Field(default=False, description="Attention projections have biases.")
    moe_intermediate_size: Size = Field(description="Inner width of one expert.")
    num_experts: Size = Field(description="Number of routed experts in a layer.")
    num_experts_per_tok: Size = Field(description="Number of experts per token.")
    norm_topk_prob: bool = Field(
        default=False, description="Scale the selected experts' router weights so that their sum is 1."
    )
    decoder_sparse_step: Size = Field(default=1, description="Every n-th layer has routed experts.")
    mlp_only_layers: tuple[NonNegativeInt, ...] = Field(
        default=(), description="Indices of layers without routed experts."
    )

    @model_validator(mode="after")
    def _check_experts_per_token(self) -> Qwen3Moe:
        _check_selection(self.num_experts_per_tok, "num_experts", self.num_experts)
        _check_expert_widths(self.hidden_size, self.moe_intermediate_size)
        return self


class LatentAttention(Decoder):
    """Multi-head latent attention (MLA) and routed experts, as in DeepSeek V2 and V3."""

    attention_bias: bool = Field(default=False, description="Attention projections have biases.")
    moe_intermediate_size: Size = Field(description="Inner width of one expert.")
    n_routed_experts: Size = Field(description="Number of routed experts in a layer.")
    n_shared_experts: Size = Field(description="Number of shared experts in a layer. Every token uses them.")
    num_experts_per_tok: Size = Field(description="Number of routed experts per token.")
    first_k_dense_replace: NonNegativeInt = Field(description="Number of leading layers without routed experts.")
    q_lora_rank: Size | None = Field(description="Rank of the query compression; null: no compression.")
    kv_lora_rank: Size = Field(description="Rank of the key and value compression.")
    qk_nope_head_dim: Size = Field(description="Width of the part of a query or key head without rotary embedding.")
    qk_rope_head_dim: Size = Field(description="Width of the part of a query or key head with rotary embedding.")
    v_head_dim: Size = Field(description="Width of a value head.")

    @model_validator(mode="after")
    def _check_experts_per_token(self) -> LatentAttention:
        _check_selection(self.num_experts_per_tok, "n_routed_experts", self.n_routed_experts)
        _check_expert_widths(self.hidden_size, self.moe_intermediate_size)
        return self

    def _check_head_width(self) -> None:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; rotary embeddings need an even width")
        # It computes keys and values for each query head.
        heads, found = self.num_attention_heads, self.num_key_value_heads
        if found != heads:
            raise ValueError(
                f"num_key_value_heads is {found}; with latent attention it must be num_attention_heads, {heads}"
            )


def _check_selection(selected: int, key: str, experts: int) -> None:
    if selected > experts:
        raise ValueError(f"num_experts_per_tok {selected} is greater than {key} {experts}")


def _check_expert_widths(hidden_size: int, moe_intermediate_size: int) -> None:
    """Raise ValueError for widths whose rows are not multiples of 16 bytes in bf16: torch's grouped products need these."""
    for key, width in (("hidden_size", hidden_size), ("moe_intermediate_size", moe_intermediate_size)):
        if width % 8:
            raise ValueError(f"{key} is {width}; with routed experts it must be a multiple of 8")


class DeepseekV2(LatentAttention):
    """DeepSeek V2."""

    n_group: Size | None = Field(
        default=None, description="Number of expert groups, for topk_method group_limited_greedy."
    )
    topk_group: Size | None = Field(
        default=None, description="Number of groups from which the experts of a token are selected."
    )
    topk_method: Literal["greedy", "group_limited_greedy"] = Field(default="greedy", description="Expert selection.")
    norm_topk_prob: bool = Field(
        default=False, description="Only false: transformers' DeepSeek V2 does not scale router weights to a sum of 1."
    )
    routed_scaling_factor: Annotated[float, Field(gt=0, le=1e4)] = Field(
        default=1.0, description="Factor for the output of the routed experts."
    )

    def _check_head_width(self) -> None:
        super()._check_head_width()
        self._check_equal_heads()  # transformers' class requires it
        for key, width in (("kv_lora_rank", self.kv_lora_rank), ("qk_nope_head_dim", self.qk_nope_head_dim)):
            if width % 2:
                raise ValueError(
                    f"{key} is {width}; the rotary embedding of transformers' deepseek_v2 needs an even width"
                )

    @model_validator(mode="after")
    def _check_network_values(self) -> DeepseekV2:
        check_network_values({"model_type": "deepseek_v2", **self.model_dump()})
        return self


# Values of config.json that transformers' networks always compute, for any value of the key.
FIXED_ROUTING = {
    "deepseek_v2": {"norm_topk_prob": False, "scoring_func": "softmax"},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}
_OTHER_FIXED_VALUES = {
    "llama": {"use_sliding_window": False},
    "qwen2": {"mlp_bias": False},
    "qwen3": {"mlp_bias": False},
    "qwen3_moe": {"mlp_bias": False},
    "deepseek_v2": {"moe_layer_freq": 1, "use_sliding_window": False},
    "deepseek_v3": {"moe_layer_freq": 1, "use_sliding_window": False, "mlp_bias": False},
}


_V3_GROUPS, _V3_SELECTED_GROUPS = 8, 4
"""Values of transformers where a config.json of DeepSeek-V3 has no n_group or topk_group."""


def check_network_values(config: HuggingFaceConfig) -> None:
    """Raise ValueError for values of a Hugging Face config with which transformers' network computes something else."""
    architecture = config["model_type"]
    for key, value in (FIXED_ROUTING.get(architecture, {}) | _OTHER_FIXED_VALUES[architecture]).items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{key} {config[key]!r} has no effect in transformers' {architecture}; it computes {value!r}"
            )
    if architecture == "deepseek_v2":
        _check_v2_groups(config)
    if architecture == "deepseek_v3":
        _check_v3_groups(config)


def _check_v2_groups(config: HuggingFaceConfig) -> None:
    method, groups, selected = config.get("topk_method", "greedy"), config.get("n_group"), config.get("topk_group")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method is {method!r}; use greedy or group_limited_greedy")
    if method == "greedy":
        for key, value in (("n_group", groups), ("topk_group", selected)):
            if value not in (None, 1):
                raise ValueError(f"{key} {value} has no effect with topk_method greedy; use group_limited_greedy")
    elif not groups or not selected or selected > groups or config["n_routed_experts"] % groups:
        raise ValueError(
            f"topk_method group_limited_greedy needs n_group {groups}, a divisor of n_routed_experts "
            f"{config['n_routed_experts']}, and topk_group {selected}, at most n_group"
        )


def _check_v3_groups(config: HuggingFaceConfig) -> None:
    """Raise ValueError if the experts of a token cannot be selected: transformers rates a group by its two best experts."""
    experts, selected_experts = config["n_routed_experts"], config["num_experts_per_tok"]
    groups, selected_groups = config.get("n_group", _V3_GROUPS), config.get("topk_group", _V3_SELECTED_GROUPS)
    for key, value in (("n_group", groups), ("topk_group", selected_groups)):
        if not value:
            raise ValueError(f"{key} is {value!r}; it must be an integer from 1")
    if experts % groups:
        raise ValueError(f"n_routed_experts {experts} is not a multiple of n_group {groups}")
    in_group = experts // groups
    if in_group < 2:
        raise ValueError(
            f"n_routed_experts {experts} in n_group {groups} groups is {in_group} expert per group; a group needs at least 2"
        )
    selectable = selected_groups * in_group
    if selected_groups > groups or selected_experts > selectable:
        raise ValueError(
            f"num_experts_per_tok {selected_experts} cannot be selected from topk_group {selected_groups} of "
            f"n_group {groups} groups, which have {selectable} experts"
        )


class DeepseekV3(LatentAttention):
    """DeepSeek V3 and R1."""

    n_group: Size = Field(default=_V3_GROUPS, description="Number of expert groups.")
    topk_group: Size = Field(
        default=_V3_SELECTED_GROUPS, description="Number of groups from which the experts of a token are selected."
    )
    norm_topk_prob: bool = Field(
        default=True, description="Scale the selected experts' router weights so that their sum is 1."
    )
    routed_scaling_factor: Annotated[float, Field(gt=0, le=1e4)] = Field(
        default=2.5, description="Factor for the output of the routed experts."
    )

    @model_validator(mode="after")
    def _check_expert_groups(self) -> DeepseekV3:
        check_network_values({"model_type": "deepseek_v3", **self.model_dump()})
        return self


class Pretrained(FrozenModel):
    """Pretrained weights to start from. Set exactly one of path and hub."""

    path: SingleLine | None = Field(default=None, description="Hugging Face model folder, relative to the config file.")
    hub: HubSource | None = Field(default=None, description="Download the weights from the Hugging Face Hub.")
    trust_remote_code: bool = Field(default=False, description="Run Python code from the model's folder.")

    @model_validator(mode="after")
    def _check_one_source(self) -> Pretrained:
        if bool(self.path) == bool(self.hub):
            raise ValueError("needs exactly one of path, hub")
        return self


class Model(FrozenModel):
    """The model. Set exactly one key; its name is the architecture."""

    llama: Llama | None = Field(default=None, description="Llama.")
    qwen2: Qwen2 | None = Field(default=None, description="Qwen2 and Qwen2.5.")
    qwen3: Qwen3 | None = Field(default=None, description="Qwen3 without routed experts.")
    qwen3_moe: Qwen3Moe | None = Field(default=None, description="Qwen3 with routed experts.")
    deepseek_v2: DeepseekV2 | None = Field(default=None, description="DeepSeek V2.")
    deepseek_v3: DeepseekV3 | None = Field(default=None, description="DeepSeek V3 and R1.")
    pretrained: Pretrained | None = Field(default=None, description="Start from pretrained weights.")

    @model_validator(mode="after")
    def _check_one_model(self) -> Model:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"needs exactly one of {', '.join(type(self).model_fields)}; found {found}")
        return self

    def config_dict(self) -> HuggingFaceConfig:
        """Return the contents of the Hugging Face config.json; empty for a pretrained model, which has its own."""
        if self.pretrained:
            return {}
        architecture, decoder = next((name, value) for name, value in self if value is not None)
        keys = decoder.model_dump(mode="json")
        rope = {"rope_type": "default", **rope_parameters(keys)}
        del keys["rope_scaling"], keys["rope_theta"]
        if keys.get("head_dim", 0) is None:
            keys["head_dim"] = keys["hidden_size"] // keys["num_attention_heads"]
        if architecture.startswith("deepseek"):
            keys["head_dim"] = keys["qk_rope_head_dim"]
        return {"model_type": architecture, **keys, "rope_parameters": rope}


ARCHITECTURES: dict[str, type[Decoder]] = {
    "llama": Llama,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "qwen3_moe": Qwen3Moe,
    "deepseek_v2": DeepseekV2,
    "deepseek_v3": DeepseekV3,
}
"""model_type of a Hugging Face config -> the class of its keys."""
