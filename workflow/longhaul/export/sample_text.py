"""Sample generations of an exported model: greedy, so that the same weights always give the same text."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from longhaul.export.layerwise_model import StreamedModel

NEW_TOKENS = 48
READ_BYTES = 50 * 10**9  # each new token reads all weights: what that may come to


def samples(
    model: StreamedModel, weights_bytes: int, tokenizer: PreTrainedTokenizerBase, prompts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Completes the trainer's prompts {"split", "input_ids": [[int]]}: [{"prompt", "split", "completion", "ended_with_eos"}].

    A prompt is how a document of the split begins: of a chat, the question in the template, up to where the answer starts.
    Large models complete fewer tokens, or none: see READ_BYTES.
    """
    room = min(NEW_TOKENS, READ_BYTES // max(1, weights_bytes))
    begun = prompts["input_ids"] if room else []
    completions = _complete(model, begun, room, tokenizer)
    return [{"split": prompts["split"], **_sample(tokenizer, *pair)} for pair in zip(begun, completions, strict=True)]


def _complete(
    model: StreamedModel, prompts: list[list[int]], room: int, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Greedy completions of at most `room` tokens, within the model's positions: one pass over the weights a token."""
    completions: list[list[int]] = [[] for _ in prompts]
    for _ in range(room):
        open_ = [
            index
            for index, made in enumerate(completions)
            if tokenizer.eos_token_id not in made and len(prompts[index]) + len(made) < model.positions
        ]
        if not open_:
            break
        logits = model.logits([torch.tensor(prompts[index] + completions[index]) for index in open_])
        for index, logits_1TV in zip(open_, logits, strict=True):
            completions[index].append(int(logits_1TV[0, -1].argmax()))
    return completions


def _sample(tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: list[int]) -> dict[str, Any]:
    return {
        "prompt": tokenizer.decode(prompt),
        "completion": tokenizer.decode(completion, skip_special_tokens=True),
        "ended_with_eos": tokenizer.eos_token_id in completion,
    }
