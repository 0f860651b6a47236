"""Finds the prompts of an export's samples that a server reads as the same tokens when they are sent as text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longhaul.artifacts.artifact_schemas import Export
from longhaul.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def completions_of_text_prompts(export: Export, sample_ids: list[list[int]]) -> dict[str, str]:
    """Return prompt -> the export's greedy completion.

    sample_ids: token ids of the samples' prompts, in the order of the samples

    Raises:
        UserError: no prompt is the same tokens again.
    """
    from tokenizers import Tokenizer  # the environment of the controller has no tokenizers, and vllm needs none here

    tokenizer = Tokenizer.from_file(str(Path(export.path) / "tokenizer.json"))
    found = {
        text: sample["completion"]
        for sample, ids in zip(export.samples, sample_ids, strict=False)
        if (text := _text_of(tokenizer, sample["prompt"], ids)) is not None
    }
    if not found:
        raise UserError(
            f"none of the {len(export.samples)} sample prompts of {export.path} can be sent as text, and `transformers serve` "
            "takes no token ids",
            "set serving.engine in the site file to vllm or sglang, or remove serve_check",
        )
    return found


def _text_of(tokenizer: Tokenizer, text: str, ids: list[int]) -> str | None:
    """Return the text that gives these ids; None if neither the text nor the one without its first special token does.

    Some tokenizers begin every text with a token of their own, which is then left out here.
    """
    without_first = text.removeprefix(tokenizer.id_to_token(ids[0]) or "")
    return next((sent for sent in (text, without_first) if tokenizer.encode(sent).ids == ids), None)
