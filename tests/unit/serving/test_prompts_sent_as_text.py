"""Only prompts that are the same tokens again are sent as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from longhaul.artifacts.artifact_schemas import Export
from longhaul.errors import UserError
from longhaul.serving.prompts_sent_as_text import completions_of_text_prompts


def export_with(folder: Path, begins_texts: bool, prompts: list[str]) -> Export:
    """Return an export whose tokenizer knows <s>, a and b; begins_texts: it writes <s> before every text."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins_texts:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    samples = [
        {"split": "train", "prompt": prompt, "completion": prompt.upper(), "ended_with_eos": True} for prompt in prompts
    ]
    return Export("main", "c", 1, str(folder), "fp32", 1, 1, {}, {}, samples, {})  # type: ignore[arg-type]


def test_a_token_that_the_tokenizer_adds_is_left_out(tmp_path: Path):
    export = export_with(tmp_path, True, ["<s>a b"])
    assert completions_of_text_prompts(export, [[0, 1, 2]]) == {"a b": "<S>A B"}


def test_a_special_token_that_the_text_has_stays(tmp_path: Path):
    export = export_with(tmp_path, False, ["<s>a b", "b <s>"])
    assert completions_of_text_prompts(export, [[0, 1, 2], [2, 0]]) == {"<s>a b": "<S>A B", "b <s>": "B <S>"}


def test_prompts_with_other_tokens_are_left_out(tmp_path: Path):
    export = export_with(tmp_path, False, ["a b", "c"])
    assert list(completions_of_text_prompts(export, [[1, 2], [2]])) == ["a b"]
    with pytest.raises(UserError, match=r"none of the 2 sample prompts of .* can be sent as text"):
        completions_of_text_prompts(export, [[2, 2], [2]])
