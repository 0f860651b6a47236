"""Compares what a server answers with the trainer's values, and answers under load with answers to the same prompts alone;
defines the accepted differences for each precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import numpy as np

from longhaul.config.field_types import Precision
from longhaul.errors import UserError
from longhaul.serving.ask_server import Answer, Token

ExportDtype = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True)
class Bound:
    """Largest accepted difference of log probabilities, in nats: on average, and of one token."""

    mean: float
    one_token: float


# What an engine's other kernels, batches and orders of sums may change. fp32: ten times what vLLM's CPU build showed for all
# families. 16 bits: differences of bf16 inference between engines are about 0.01 on average, and up to 1 for single tokens
# where a mixture of experts chooses another expert. They are bounds for software, not a measure of quality.
_ROUNDING: dict[Precision, Bound] = {
    "fp32": Bound(mean=0.001, one_token=0.005),
    "bf16": Bound(mean=0.1, one_token=2.0),
    "fp16": Bound(mean=0.02, one_token=0.5),
}
SAME_TEXT: dict[Precision, float] = {"fp32": 0.75, "bf16": 0.5, "fp16": 0.5}
"""Least share of an export's greedy text that an engine without log probabilities must give, on average over the samples.
It is below 1 because a tie between two tokens changes all tokens after it."""


def coarsest(trained: Precision, exported: ExportDtype) -> Precision:
    """Return the precision with the fewest bits among the trainer's and the one that the engine computes in."""
    served: Precision = "fp32" if exported == "fp32" else "bf16"
    return max((trained, served), key=["fp32", "fp16", "bf16"].index)


def bound_for(precision: Precision, logit_difference: float) -> Bound:
    """Return the bound for a server.

    logit_difference: largest difference between the logits of the export and the trainer's, which the export's verification
    measured. It moves a log probability by at most twice as much.
    """
    rounding = _ROUNDING[precision]
    return Bound(rounding.mean + 2 * logit_difference, rounding.one_token + 2 * logit_difference)


def compare_log_probabilities(found_PT: np.ndarray, expected_PT: np.ndarray, bound: Bound) -> tuple[float, float]:
    """Return the mean and the largest absolute difference of two tables [P, T].

    Raises:
        UserError: one of them exceeds its bound, or is not a number.
    """
    difference_PT = np.abs(found_PT - expected_PT)
    mean, largest = float(difference_PT.mean()), float(difference_PT.max())
    if not (mean <= bound.mean and largest <= bound.one_token):
        raise UserError(
            f"log probabilities of the server differ from the trainer's by {mean:.3g} on average and by up to {largest:.3g}; "
            f"the limits are {bound.mean:.3g} and {bound.one_token:.3g}",
            "do not use this engine for this model; the how-to page lists what is known to differ",
        )
    return mean, largest


def compare_texts(found: Sequence[str], expected: Sequence[str], least: float) -> float:
    """Return the share of the expected texts that the found ones begin with, on average.

    An answer that is limited to fewer tokens than its expected text counts as far as it goes.

    Raises:
        UserError: it is below the least share.
    """
    share = sum(_same_share(*pair) for pair in zip(found, expected, strict=True)) / len(found)
    if share < least:
        raise UserError(
            f"greedy answers of the server equal the export's completions in {share:.0%} of their text on average; the limit is "
            f"{least:.0%}",
            "do not use this engine for this model; the how-to page lists what is known to differ",
        )
    return share


def _same_share(found: str, expected: str) -> float:
    # The last token may end within a character, which is then shown as U+FFFD.
    found, expected = found.rstrip("\ufffd"), expected.rstrip("\ufffd")
    length = min(len(found), len(expected))
    if not length:
        return float(found == expected)
    same = next((place for place in range(length) if found[place] != expected[place]), length)
    return same / length


def changed_answer(alone: Answer, loaded: Answer, largest: float) -> str | None:
    """Return how an answer under load differs from the answer to the same prompt alone; None if it is the same answer.

    Batching changes the order of sums. So log probabilities may differ by `largest`, and where two tokens are as likely to
    within twice that, the other one may be chosen. Everything after such a token may differ.
    """
    if not alone.tokens:
        return None if alone.text == loaded.text else f"{loaded.text[:80]!r} instead of {alone.text[:80]!r}"
    same = _equal_tokens(alone, loaded)
    for place, (one, other) in enumerate(same, start=1):
        if not abs(one.log_probability - other.log_probability) <= largest:
            return f"the log probability of token {place} is {other.log_probability:.4g} instead of {one.log_probability:.4g}"
    if len(same) < min(len(alone.tokens), len(loaded.tokens)):
        one, other = alone.tokens[len(same)], loaded.tokens[len(same)]
        likeness = one.alternatives.get(other.text)
        if likeness is None or one.log_probability - likeness > 2 * largest:
            return f"token {len(same) + 1} is {other.text!r} instead of {one.text!r}"
        return None
    return (
        None
        if len(alone.tokens) == len(loaded.tokens)
        else f"{len(loaded.tokens)} tokens instead of {len(alone.tokens)}"
    )


def largest_difference(alone: Sequence[Answer], loaded: Sequence[Answer]) -> float | None:
    """Return the largest difference of log probabilities between answers to the same prompts; None without log probabilities.

    After a token that differs, the answers continue another text, so their log probabilities are not compared.
    """
    differences = [
        abs(one.log_probability - other.log_probability)
        for answers in zip(alone, loaded, strict=True)
        for one, other in _equal_tokens(*answers)
    ]
    return max(differences, default=None)


def _equal_tokens(alone: Answer, loaded: Answer) -> list[tuple[Token, Token]]:
    """Return the pairs of tokens before the first two that differ."""
    pairs = zip(alone.tokens, loaded.tokens, strict=False)
    return list(takewhile(lambda pair: pair[0].text == pair[1].text, pairs))
