"""The plan compares a tokenizer folder with the model's vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longhaul.data.tokenizers.tokenizer_size import check_tokenizer_folder
from longhaul.errors import UserError
from tests.support.small_configs import plan_of


def check(folder: Path, tokenizer: Any) -> None:
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer/tokenizer.json").write_text(tokenizer if isinstance(tokenizer, str) else json.dumps(tokenizer))
    check_tokenizer_folder(plan_of(folder, {"tokenizer": {"path": "tokenizer"}}))


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"vocab": {"a": 0, "b": 399}}},
        {"model": {"vocab": [["a", 0.0]] * 400}},
        {"model": {"vocab": {}}, "added_tokens": [{"id": 399}]},
    ],
)
def test_a_tokenizer_as_large_as_the_vocabulary_fits(tmp_path: Path, tokenizer: Any):
    check(tmp_path, tokenizer)


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"vocab": {"a": 400, "b": 0}}},
        {"model": {"vocab": [["a", 0.0]] * 401}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 400}]},
    ],
)
def test_a_larger_tokenizer_is_refused_until_another_is_used(tmp_path: Path, tokenizer: Any):
    with pytest.raises(UserError, match="the tokenizer has 401 tokens; the model's vocab_size is 400") as refused:
        check(tmp_path, tokenizer)
    assert "use the tokenizer of the pretrained model" in refused.value.hint
    check(tmp_path, {"model": {"vocab": {"a": 0}}})


@pytest.mark.parametrize(
    "tokenizer", ["{", [], {"model": 1}, {"model": {"vocab": {"a": "x"}}}, "[" * 5000, {"model": None}]
)
def test_what_is_no_tokenizer_is_refused_until_one_is_there(tmp_path: Path, tokenizer: Any):
    with pytest.raises(UserError, match=r"tokenizer.path: cannot read .*tokenizer.json"):
        check(tmp_path, tokenizer)
    check(tmp_path, {"model": {"vocab": {"a": 0}}})


def test_a_trained_tokenizer_is_not_read(tmp_path: Path):
    check_tokenizer_folder(plan_of(tmp_path))
