"""Checks before a job loads a tokenizer: its keys, and that it has no more tokens than the model's vocab_size."""

from __future__ import annotations

from typing import Any

import orjson

from longhaul.data.tokenizers.tokenizer_keys import check_tokenizer_keys
from longhaul.errors import InputError, UserError
from longhaul.planning import Plan, model_config


def check_tokenizer_folder(plan: Plan) -> None:
    """Raise UserError if the tokenizer of `tokenizer.path` cannot be read or has more tokens than the model."""
    written, model = plan.config.tokenizer.path, model_config(plan.loaded, plan.lock)
    if written is None:
        return
    folder = plan.loaded.resolve("tokenizer.path", written)
    check_tokenizer_keys(folder)
    if model is None:
        return
    path = folder / "tokenizer.json"
    try:
        size = _highest_id(orjson.loads(path.read_bytes())) + 1
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"tokenizer.path: cannot read {path}: {error}", "give the path of a Hugging Face tokenizer folder"
        ) from None
    require_size(size, model["vocab_size"])


def require_size(size: int, limit: int) -> None:
    """Raise InputError for a tokenizer of more tokens than the model's vocab_size, which is `limit`."""
    if size > limit:
        raise InputError(
            f"the tokenizer has {size} tokens; the model's vocab_size is {limit}",
            "use the tokenizer of the pretrained model; for a model from random weights, raise vocab_size",
        )


def _highest_id(settings: dict[str, Any]) -> int:
    vocabulary, added = settings["model"].get("vocab", {}), settings.get("added_tokens") or ()
    # Unigram has a list, in which a token's id is its position.
    ids = range(len(vocabulary)) if isinstance(vocabulary, list) else map(int, vocabulary.values())
    return max(max(ids, default=-1), max((int(token["id"]) for token in added), default=-1))
