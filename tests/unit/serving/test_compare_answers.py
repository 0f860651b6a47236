"""Bounds of differences, and what makes an answer under load another answer than the one to the same prompt alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from longhaul.errors import UserError
from longhaul.serving.ask_server import Answer, Token, read_answer
from longhaul.serving.compare_answers import (
    Bound,
    bound_for,
    changed_answer,
    coarsest,
    compare_log_probabilities,
    compare_texts,
    largest_difference,
)
from longhaul.serving.measure_load import distinct_prompts
from longhaul.serving.reference_values import log_probabilities

BOUND = Bound(mean=0.01, one_token=0.1)


def answer(*tokens: tuple[str, float, dict[str, float]]) -> Answer:
    return Answer(
        "".join(text for text, *_ in tokens), "length", tuple(Token(*token) for token in tokens), len(tokens), ()
    )


def test_log_probabilities_are_those_of_the_next_tokens():
    logits_PTV = np.log([[[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]]).astype(np.float32)
    found_PT = log_probabilities(np.array([[0, 1, 0]]), logits_PTV + 7)  # adding a number to all logits changes nothing
    assert found_PT == pytest.approx(np.log([[0.8, 0.5]]), abs=1e-6)


def test_differences_within_the_bounds_are_returned():
    mean, largest = compare_log_probabilities(np.array([[-1.0, -2.0]]), np.array([[-1.0, -2.015]]), BOUND)
    assert (mean, largest) == pytest.approx((0.0075, 0.015))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([-1.0, -2.2], r"0\.1 on average and by up to 0\.2; the limits are 0\.01 and 0\.1"),
        ([-1.015, -2.015], r"0\.015 on average"),
        ([-1.0, math.nan], "nan on average"),
    ],
)
def test_differences_beyond_a_bound_are_refused(found: list[float], message: str):
    with pytest.raises(UserError, match=message):
        compare_log_probabilities(np.array([found]), np.array([[-1.0, -2.0]]), BOUND)


def test_the_bound_grows_by_twice_what_the_export_changed():
    plain, rounded = bound_for("fp32", 0.0), bound_for("fp32", 0.25)
    assert (rounded.mean - plain.mean, rounded.one_token - plain.one_token) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    ("trained", "exported", "expected"),
    [("fp32", "fp32", "fp32"), ("fp32", "bf16", "bf16"), ("bf16", "fp32", "bf16"), ("fp16", "fp8", "bf16")],
)
def test_the_coarsest_precision_decides(trained, exported, expected):
    assert coarsest(trained, exported) == expected


def test_texts_are_compared_as_far_as_both_go():
    assert compare_texts(["abcd", "ab\ufffd", ""], ["abcdefgh", "ab", ""], 1.0) == 1.0
    assert compare_texts(["abXX", "abcd"], ["abcd", "abcd"], 0.75) == 0.75
    with pytest.raises(UserError, match=r"in 75% of their text on average; the limit is 80%"):
        compare_texts(["abXX", "abcd"], ["abcd", "abcd"], 0.8)


ALONE = answer(("a", -0.5, {"a": -0.5, "b": -0.6}), ("c", -0.1, {"c": -0.1, "d": -3.0}))


@pytest.mark.parametrize(
    ("loaded", "difference"),
    [
        (ALONE, None),
        (answer(("a", -0.55, {}), ("c", -0.02, {})), None),
        (answer(("b", -0.59, {}), ("x", -9.0, {})), None),  # b is as likely as a, and changes all after it
        (answer(("x", -0.5, {}), ("c", -0.1, {})), "token 1 is 'x' instead of 'a'"),
        (answer(("a", -0.5, {}), ("d", -0.1, {})), "token 2 is 'd' instead of 'c'"),
        (answer(("a", -0.7, {}), ("c", -0.1, {})), "the log probability of token 1 is -0.7 instead of -0.5"),
        (answer(("a", math.nan, {}), ("c", -0.1, {})), "the log probability of token 1 is nan instead of -0.5"),
        (answer(("a", -0.5, {})), "1 tokens instead of 2"),
    ],
)
def test_an_answer_under_load_may_differ_by_rounding_alone(loaded: Answer, difference: str | None):
    assert changed_answer(ALONE, loaded, 0.1) == difference


def test_log_probabilities_under_load_are_compared_up_to_another_token():
    moved = answer(("a", -0.75, {}), ("c", -0.1, {}))
    other = answer(("a", -0.5, {}), ("d", -9.0, {}))
    assert largest_difference([ALONE, ALONE], [ALONE, moved]) == pytest.approx(0.25)
    assert largest_difference([ALONE], [other]) == 0.0
    assert (
        largest_difference([Answer("abc", "length", (), 3, ())] * 2, [Answer("abc", "length", (), 3, ())] * 2) is None
    )


def test_without_log_probabilities_the_text_must_be_equal():
    alone = Answer("abc", "length", (), 3, ())
    assert changed_answer(alone, alone, 0.1) is None
    assert changed_answer(alone, Answer("abd", "length", (), 3, ()), 0.1) == "'abd' instead of 'abc'"


def test_a_streamed_answer_is_put_together():
    scores = {"tokens": ["b"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -0.5}]}
    found = read_answer(
        [
            (0.1, {"choices": [{"text": "a"}]}),
            (0.3, {"choices": [{"text": "b", "finish_reason": "length", "logprobs": scores}]}),
            (0.4, {"choices": [], "usage": {"completion_tokens": 2}}),
        ]
    )
    assert found == Answer("ab", "length", (Token("b", -0.5, {"b": -0.5}),), 2, (0.1, 0.3))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([], "it ended without a finish reason"),
        ([(0.1, {"choices": [{"text": "a"}]})], "it ended without a finish reason"),
        ([(0.1, {"error": "worker died"})], "worker died"),
    ],
)
def test_a_lost_answer_is_noticed(pieces: list, message: str):
    with pytest.raises(UserError, match=f"the server lost an answer: {message}"):
        read_answer(pieces)


def test_prompts_for_the_load_are_distinct():
    found = distinct_prompts([[1, 2, 3], [4, 5, 6]], 6)
    assert sorted(map(tuple, found)) == [(1, 2, 3), (2, 3, 1), (3, 1, 2), (4, 5, 6), (5, 6, 4), (6, 4, 5)]
    assert distinct_prompts(["to be or"], 4) == ["to be or", "be or to", "or to be", "to be or"]
