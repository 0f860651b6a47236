"""Sample generations of the exported model: greedy, so the same export always gives the same text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 48
PROMPT_TOKENS = 24
QUESTIONS = ("Who are you?", "What is 17 + 25?", "Name three colours.")


def samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids_PT: torch.Tensor, count: int, chat: bool
) -> list[dict[str, Any]]:
    """Completions of the first `count` of the trainer's proof prompts: [{"prompt", "completion", "ended_with_eos"}].

    chat: each prompt is the first question in its row, rendered by the chat template up to where the answer begins;
    where no row holds one, a few fixed questions. Otherwise it is the row's first tokens.
    """
    prompts = [_question(tokenizer, row.tolist()) if chat else _opening(row.tolist()) for row in input_ids_PT]
    if not any(prompts):
        prompts = [_rendered(tokenizer, question) for question in QUESTIONS]
    return [_complete(model, tokenizer, prompt) for prompt in _distinct(prompts)[:count]]


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


def _complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> dict[str, Any]:
    ids = torch.tensor([prompt], device=model.device)
    room = max(1, min(NEW_TOKENS, model.config.get_text_config().max_position_embeddings - len(prompt)))
    with torch.no_grad():
        output = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False
        )
    new = output[0, len(prompt) :].tolist()
    return {
        "prompt": tokenizer.decode(prompt),
        "completion": tokenizer.decode(new, skip_special_tokens=True),
        "ended_with_eos": tokenizer.eos_token_id in new,
    }
