"""Sample generations of the exported model: greedy, so the same export always gives the same text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from longhaul.convert.streamed import StreamedModel

NEW_TOKENS = 48
READ_BYTES = 50 * 10**9  # each new token reads all weights: what that may come to
PROMPT_TOKENS = 24
QUESTIONS = ("Who are you?", "What is 17 + 25?", "Name three colours.")


def samples(
    model: StreamedModel,
    weights_bytes: int,
    tokenizer: PreTrainedTokenizerBase,
    input_ids_PT: torch.Tensor,
    count: int,
    chat: bool,
) -> list[dict[str, Any]]:
    """Completions of the first `count` of the trainer's proof prompts: [{"prompt", "completion", "ended_with_eos"}].

    chat: each prompt is the first question in its row, rendered by the chat template up to where the answer begins;
    where no row holds one, a few fixed questions. Otherwise it is the row's first tokens.
    Large models complete fewer tokens, or none: see READ_BYTES.
    """
    prompts = [_question(tokenizer, row.tolist()) if chat else _opening(row.tolist()) for row in input_ids_PT]
    if not any(prompts):
        prompts = [_rendered(tokenizer, question) for question in QUESTIONS]
    prompts = _distinct(prompts)[:count]
    room = min(NEW_TOKENS, READ_BYTES // max(1, weights_bytes))
    if not prompts or not room:
        return []
    completions = _complete(model, prompts, room, tokenizer.eos_token_id)
    return [_sample(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]


def _opening(row: list[int]) -> list[int]:
    return row[:PROMPT_TOKENS]


def _question(tokenizer: PreTrainedTokenizerBase, row: list[int]) -> list[int]:
    """A packed row up to and with the template's first generation prompt; empty when it holds none."""
    marker = _generation_prompt(tokenizer)
    for start in range(len(row) - len(marker) + 1):
        if row[start : start + len(marker)] == marker:
            return row[: start + len(marker)]
    return []


def _rendered(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    chat = [{"role": "user", "content": question}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    return tokenizer.encode(text, add_special_tokens=False)


def _generation_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the chat template puts before an answer."""
    chat = [{"role": "user", "content": "?"}]
    plain = tokenizer.apply_chat_template(chat, tokenize=False)
    prompted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    suffix = str(prompted).removeprefix(str(plain))
    return tokenizer.encode(suffix, add_special_tokens=False)


def _distinct(prompts: Iterable[list[int]]) -> list[list[int]]:
    return [list(prompt) for prompt in dict.fromkeys(tuple(prompt) for prompt in prompts if prompt)]


def _complete(model: StreamedModel, prompts: list[list[int]], room: int, eos: int | None) -> list[list[int]]:
    """Greedy completions of at most `room` tokens, all prompts in one pass over the weights a token."""
    completions: list[list[int]] = [[] for _ in prompts]
    for _ in range(room):
        open_ = [index for index, made in enumerate(completions) if eos is None or eos not in made]
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
