"""Every family's export loads in other engines, and they compute the log probabilities of the tested transformers.

The exporter proved that transformers 5 computes the trainer's logits, so the engines agree with the trainer, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.make_exports import CASES

# In fp32, engines differ in the order of their sums only. Log probabilities are of size 1 to 20.
VLLM_BOUND = 2e-4
TRANSFORMERS_BOUND = 1e-4


def largest_difference(found: list[list[float]], expected: list[list[float]]) -> float:
    """Return the largest absolute difference of two tables of log probabilities."""
    pairs = [pair for rows in zip(found, expected, strict=True) for pair in zip(*rows, strict=True)]
    assert len(pairs) == 2 * 23
    return max(abs(one - other) for one, other in pairs)


def test_transformers_4_computes_and_tokenizes_alike(
    exports: dict[str, Path], prompts: Path, reference: dict[str, Any], run_script: Callable[..., Any]
):
    found = run_script("transformers 4", "score_with_transformers.py", prompts, "OUT", *exports.values())
    assert found["version"].startswith("4.57.")
    for name, folder in exports.items():
        own = found[str(folder)]
        assert largest_difference(own["scores"], reference[name]["scores"]) < TRANSFORMERS_BOUND, name
        assert own["dtype"] == reference[name]["dtype"], name
        # transformers 5 reads every tokenizer of a qwen2 model as Qwen2's; the model card says so.
        assert own["ids"] == reference[name]["ids"] or CASES[name].kind == "qwen2", name


@pytest.mark.parametrize("name", CASES)
def test_vllm_computes_alike(
    name: str, exports: dict[str, Path], prompts: Path, reference: dict[str, Any], run_script: Callable[..., Any]
):
    found = run_script("vllm", "score_with_vllm.py", exports[name], prompts, "OUT")
    assert largest_difference(found, reference[name]["scores"]) < VLLM_BOUND
