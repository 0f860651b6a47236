"""A small Qwen 2 model, its tokenizer and data as local files, in the places that the examples without hub access name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.support.chat_families import make_family_tokenizer
from tests.support.pipeline_run import write_data

_HIDDEN, _INTERMEDIATE, _LAYERS, _HEADS = 64, 128, 2, 4


def write_local_files(folder: Path) -> None:
    """Write model/, data/chats.jsonl and data/text/prose.jsonl below `folder`."""
    write_data(folder)
    text = folder / "data" / "text"
    text.mkdir(parents=True)
    (folder / "prose.jsonl").rename(text / "prose.jsonl")
    (folder / "chats.jsonl").rename(folder / "data" / "chats.jsonl")
    vocabulary = make_family_tokenizer("qwen3", folder / "model").vocab_size
    _write_model(folder / "model", vocabulary)


def _write_model(folder: Path, vocabulary: int) -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocabulary, _HIDDEN), "lm_head.weight": (vocabulary, _HIDDEN)}
    shapes["model.norm.weight"] = (_HIDDEN,)
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (_HIDDEN, _HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}.self_attn.{name}_proj.bias": (_HIDDEN,) for name in "qkv"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (_INTERMEDIATE, _HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (_HIDDEN, _INTERMEDIATE)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (_HIDDEN,) for name in ("input", "post_attention")}
    random = np.random.default_rng(0)
    tensors = {
        name: np.ones(shape, np.float32) if "norm" in name else random.normal(0, 0.02, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
