"""First weights from a Hugging Face folder, one tensor at a time, for layouts in which no rank holds the whole model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longhaul.errors import UserError
from longhaul.zero_checkpoint import Held, LazyTensor, Readable, open_safetensors

_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_HINT = "the weights do not belong to this config.json, or the download is incomplete"


def pretrained_values(folder: Path, names: set[str], config: Any) -> Callable[[str, torch.Size], Readable]:
    """The values of the model's tensors in safetensors, unread.

    names: of all tensors of the model, as transformers has them; the hub's folder holds experts one by one.

    Raises:
        UserError: a tensor is missing, left over or of another shape. The layers that predict further tokens, which
            DeepSeek's folders hold behind the last one, are left out.
    """
    stored = {
        key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in open_safetensors(path).items()
    }
    if not stored:
        raise UserError(f"{folder} holds no *.safetensors", "save the model with save_pretrained: pickles are not read")
    keys = {name: _stored_keys(name, config) for name in names}
    wanted = {key for found in keys.values() for key in found}
    extra_layer = f"model.layers.{config.num_hidden_layers}."
    unknown = sorted(
        key for key in set(stored) - wanted if not key.startswith(extra_layer) and not _is_tied(key, config)
    )
    if missing := sorted(wanted - set(stored)):
        raise UserError(f"{folder}: missing keys: {', '.join(missing[:5])} ({len(missing)} in all)", _HINT)
    if unknown:
        raise UserError(f"{folder}: unexpected keys: {', '.join(unknown[:5])} ({len(unknown)} in all)", _HINT)

    def values(name: str, shape: torch.Size) -> Readable:
        found = _found(stored, keys[name], shape)
        if found.shape != tuple(shape):
            raise UserError(f"{folder}: {name} is {list(found.shape)}, the model wants {list(shape)}", _HINT)
        return found

    return values


def _is_tied(key: str, config: Any) -> bool:
    return key == "lm_head.weight" and config.tie_word_embeddings


def _stored_keys(name: str, config: Any) -> list[str]:
    """The hub's keys of a tensor: of fused experts, each expert's gate and up, or down projection, in order."""
    match = _FUSED.fullmatch(name)
    if not match:
        return [name]
    parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
    experts = getattr(config, "n_routed_experts", None) or config.num_experts
    return [f"{match[1]}.{expert}.{part}.weight" for expert in range(experts) for part in parts]


def _found(stored: dict[str, LazyTensor], keys: list[str], shape: torch.Size) -> Readable:
    if len(keys) == 1:
        return stored[keys[0]]
    rows = torch.cat([stored[key].read() for key in keys])
    return Held(rows.view(shape) if rows.numel() == shape.numel() else rows)
