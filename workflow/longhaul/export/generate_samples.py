"""Generates the sample texts of an export by greedy decoding: 48 new tokens for each of the trainer's prompts. Decoding is
greedy, so the same weights always give the same text. A text ends at any of the model's end tokens, as in a server.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from longhaul.artifacts.artifact_schemas import GeneratedSample
from longhaul.export.layerwise_model import LayerwiseModel

NEW_TOKENS = 48
READ_BYTES = 50 * 10**9
"""Limit of the bytes that generation reads. Each new token reads all weights once."""


class SamplePrompts(TypedDict):
    """The content of prompts.json."""

    split: str
    input_ids: list[list[int]]


def generate_samples(
    model: LayerwiseModel,
    weights_bytes: int,
    tokenizer: PreTrainedTokenizerBase,
    ends: set[int],
    prompts: SamplePrompts,
) -> list[GeneratedSample]:
    """Complete the trainer's prompts and return [{"split", "prompt", "completion", "ended_with_eos"}].

    weights_bytes: size of the exported weights. Large models get fewer new tokens, or no samples: see READ_BYTES.
    ends:          ids of the tokens that end a text
    prompts:       {"split": name, "input_ids": [[token id]]}. A prompt is the beginning of a document of the split. For a
                   chat it is the question in the chat template, up to the start of the answer.
    """
    new_tokens = min(NEW_TOKENS, READ_BYTES // max(1, weights_bytes))
    input_ids = prompts["input_ids"] if new_tokens else []
    completions = _complete(model, input_ids, new_tokens, ends)
    return [
        _sample(tokenizer, prompts["split"], prompt, completion, ends)
        for prompt, completion in zip(input_ids, completions, strict=True)
    ]


def _complete(model: LayerwiseModel, prompts: list[list[int]], new_tokens: int, ends: set[int]) -> list[list[int]]:
    """Return greedy completions of at most `new_tokens` tokens, within the model's positions.

    Each new token needs one pass over the weights, for all prompts together.
    """
    completions: list[list[int]] = [[] for _ in prompts]
    for _ in range(new_tokens):
        unfinished = [
            index
            for index, completion in enumerate(completions)
            if ends.isdisjoint(completion) and len(prompts[index]) + len(completion) < model.positions
        ]
        if not unfinished:
            break
        logits = model.logits([torch.tensor(prompts[index] + completions[index]) for index in unfinished])
        for index, logits_1TV in zip(unfinished, logits, strict=True):
            completions[index].append(int(logits_1TV[0, -1].argmax()))
    return completions


def _sample(
    tokenizer: PreTrainedTokenizerBase, split: str, prompt: list[int], completion: list[int], ends: set[int]
) -> GeneratedSample:
    return {
        "split": split,
        "prompt": str(tokenizer.decode(prompt)),
        "completion": str(tokenizer.decode(completion, skip_special_tokens=True)),
        "ended_with_eos": not ends.isdisjoint(completion),
    }
