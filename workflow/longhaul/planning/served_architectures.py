"""Refuses to serve a network that vLLM or SGLang cannot load, or would compute otherwise than the trainer did.

Such a server often starts and answers with noise. Read from vLLM 0.32 and SGLang 0.5.23; `make test-serve` runs vLLM only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.hub_tensors import FP8_BLOCK
from longhaul.config.parameter_counts import has_latent_attention, head_dim, key_value_heads, sparse_layers
from longhaul.config.rotary_embedding import RotaryNumbers, rope_parameters, rotary_numbers
from longhaul.config.site_serving_config import EngineName
from longhaul.config.stage_config import Stage
from longhaul.errors import UserError

# Biases that the engine's network does not have. It leaves them out when it reads an export, without a word.
_MISSING_BIASES: dict[EngineName, dict[str, str]] = {
    "transformers": {},
    # o_proj of Qwen3 has none there.
    "vllm": dict.fromkeys(("deepseek_v2", "deepseek_v3", "qwen3", "qwen3_moe"), "attention_bias"),
    "sglang": {"deepseek_v2": "attention_bias", "deepseek_v3": "attention_bias", "llama": "mlp_bias"},
}
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")


def check_network(stage: Stage, model: HuggingFaceConfig, engine: EngineName, context: int) -> None:
    """Raise UserError if the engine cannot serve the export of this network with requests of `context` tokens."""
    if stage.export_dtype == "fp8" and engine != "transformers":
        _check_fp8(stage, model, engine)
    if difference := _difference(engine, model, context):
        others = [other for other in reversed(get_args(EngineName)) if not _difference(other, model, context)]
        raise UserError(
            f"stages.{stage.name}: {engine} cannot serve this model: {difference}",
            f"set serving.engine in the site file to {' or '.join(others)}",
        )


def check_pipeline(stage: Stage, model: HuggingFaceConfig, engine: EngineName, ranks: int) -> None:
    """Raise UserError for pipeline ranks that the engine's network does not have.

    The last rank of SGLang's Llama takes the embedding for its head, and the first rank alone has the embedding.
    """
    if engine == "sglang" and model["model_type"] == "llama" and model.get("tie_word_embeddings") and ranks > 1:
        raise UserError(
            f"stages.{stage.name}.serve: sglang cannot serve a llama with tie_word_embeddings on {ranks} pipeline ranks",
            "set serve.nodes to 1 and serve.gpus_per_node to a divisor of the number of heads, or serving.engine in the site "
            "file to vllm",
        )


def _difference(engine: EngineName, c: HuggingFaceConfig, context: int) -> str | None:
    """Return what the engine computes otherwise; None if it computes the network."""
    if engine == "transformers":
        return None
    differences = (
        _missing_bias(engine, c),
        _missing_dense_layer(engine, c),
        _other_rotation(engine, c),
        _other_window(engine, c, context),
    )
    return next(filter(None, differences), None)


def _missing_bias(engine: EngineName, c: HuggingFaceConfig) -> str | None:
    key = _MISSING_BIASES[engine].get(c["model_type"])
    return f"it leaves out biases that {key} true adds" if key and c.get(key) else None


def _missing_dense_layer(engine: EngineName, c: HuggingFaceConfig) -> str | None:
    dense = sparse_layers(c).count(False)
    if engine == "sglang" and c["model_type"] == "qwen3_moe" and dense:
        return (
            f"it has routed experts in every layer of a qwen3_moe, and leaves out the weights of {dense} layers without "
            "(mlp_only_layers, decoder_sparse_step)"
        )
    return None


def _other_rotation(engine: EngineName, c: HuggingFaceConfig) -> str | None:
    rope, latent = rope_parameters(c), has_latent_attention(c)
    kind = rope.get("rope_type", "default")
    if engine == "vllm" and c.get("rope_interleave") is False:
        return "it does not follow rope_interleave false"
    if latent and kind not in ("default", "yarn"):
        return f"of a {c['model_type']} it computes rope_type yarn only, and rope_scaling.rope_type is {kind}"
    if engine == "sglang" and kind == "dynamic" and rope["factor"] > 1:
        return "with rope_type dynamic it scales the angles of short prompts, too"
    ignored = [key for key in _ignored_keys(engine, kind, latent) if key in rope]
    read = {key: value for key, value in rope.items() if key not in ignored}
    if latent and "mscale_all_dim" in rope and "mscale" not in rope:
        ignored, read["mscale"] = [*ignored, "mscale_all_dim"], 1
    other = {key: value for key, value in c.items() if key not in _ROPE_KEYS} | {"rope_parameters": read}
    if not ignored or _equal(rotary_numbers(c), rotary_numbers(other)):
        return None
    return "it does not follow " + " and ".join(f"rope_scaling.{key} {rope[key]}" for key in ignored)


def _ignored_keys(engine: EngineName, kind: str, latent: bool) -> tuple[str, ...]:
    if kind == "longrope":
        return ("attention_factor", "factor")  # the scale comes from the two numbers of positions
    if kind == "yarn" and latent:
        return ("attention_factor", "truncate")
    return ("attention_factor",) if kind == "yarn" and engine == "sglang" else ()


def _equal(one: RotaryNumbers, other: RotaryNumbers) -> bool:
    numbers = [(*each.inverse_frequencies, each.attention_scale, each.softmax_scale) for each in (one, other)]
    return all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(*numbers, strict=True))


def _other_window(engine: EngineName, c: HuggingFaceConfig, context: int) -> str | None:
    window = c.get("sliding_window") if c.get("use_sliding_window") else None
    layers = _layers_with_window(c) if window and context > window else 0
    if engine == "sglang" and layers:
        return f"it attends to all {context} tokens of serve.context, and not to those of sliding_window {window}"
    if engine == "vllm" and 0 < layers < c["num_hidden_layers"]:
        return f"it has no networks in which {layers} of {c['num_hidden_layers']} layers have a sliding_window"
    return None


def _layers_with_window(c: HuggingFaceConfig) -> int:
    if c.get("layer_types"):
        return c["layer_types"].count("sliding_attention")
    return max(0, c["num_hidden_layers"] - c.get("max_window_layers", 28))  # 28: the default of transformers


def _check_fp8(stage: Stage, model: HuggingFaceConfig, engine: EngineName) -> None:
    """Raise UserError for an FP8 export that the engine cannot compute.

    Both engines join projections, and the factors with them. Where a block would hold rows of two matrices, they end, or write
    one factor over the other and answer with noise. They quantize the input of a matrix in groups of 128, and end at a remainder.
    SGLang's Llama looks for the factors under the name of another format, and computes without them.
    """
    where = f"stages.{stage.name}: {engine} cannot serve this model with export_dtype fp8"
    for name, width in (*_joined_widths(model), *_input_widths(model)):
        if width % FP8_BLOCK:
            raise UserError(
                f"{where}: {name} is {width}, no multiple of the block size {FP8_BLOCK}", "set export_dtype to bf16"
            )
    if engine == "sglang" and model["model_type"] == "llama":  # after the widths: vllm needs them, too
        raise UserError(
            f"{where}: SGLang reads no factors of blocks for a llama",
            "set export_dtype to bf16, or serving.engine in the site file to vllm",
        )


def _joined_widths(c: HuggingFaceConfig) -> Iterator[tuple[str, int]]:
    """Yield (name, rows) of matrices that vLLM and SGLang join with another one: gate and up, query, key and value."""
    yield from mlp_widths(c)
    if not has_latent_attention(c):
        yield "num_attention_heads x head_dim", c["num_attention_heads"] * head_dim(c)
        yield "num_key_value_heads x head_dim", key_value_heads(c) * head_dim(c)
    elif query_rank := c.get("q_lora_rank"):
        yield "q_lora_rank", query_rank


def _input_widths(c: HuggingFaceConfig) -> Iterator[tuple[str, int]]:
    """Yield (name, columns) of the matrices whose columns are not the rows of a joined one."""
    yield "hidden_size", c["hidden_size"]
    if has_latent_attention(c):
        yield "kv_lora_rank", c["kv_lora_rank"]
        yield "num_attention_heads x v_head_dim", c["num_attention_heads"] * c["v_head_dim"]


def mlp_widths(c: HuggingFaceConfig) -> Iterator[tuple[str, int]]:
    """Yield (config key, value) of the inner widths of the MLPs and experts that the model has."""
    is_sparse = sparse_layers(c)
    if not all(is_sparse):
        yield "intermediate_size", c["intermediate_size"]
    if any(is_sparse):
        yield "moe_intermediate_size", c["moe_intermediate_size"]
