"""Sample generations of the exported model from held-out text: greedy, so the same export always gives the same text."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 48


def samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Completes the trainer's prompts {"split", "input_ids": [[int]]}: [{"prompt", "split", "completion", "ended_with_eos"}].

    A prompt is how a document of the split begins: of a chat, the question in the template, up to where the answer starts.
    """
    return [{"split": prompts["split"], **_complete(model, tokenizer, ids)} for ids in prompts["input_ids"]]


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
