"""The table of evaluations compares each metric with that of the model before the stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from longhaul.artifacts.evaluation_result import EvaluationResult, Score
from longhaul.report.evaluation_table import evaluation_rows


def result(
    model: str,
    value: float,
    error: float | None,
    higher_is_better: bool | None = True,
    template: str | None = None,
    data: Sequence[str] = (),
) -> EvaluationResult:
    score = Score(
        task="quiz",
        metric="acc",
        filter="none",
        value=value,
        standard_error=error,
        higher_is_better=higher_is_better,
        documents=50,
    )
    return EvaluationResult("chat", model, "quiz", "p", None, [score], {"chat_template_hash": template}, list(data))


@pytest.mark.parametrize(
    ("start", "trained", "error", "higher_is_better", "change", "better"),
    [
        (0.25, 0.75, 0.05, True, "+0.5", True),
        (0.75, 0.25, 0.05, True, "-0.5", False),
        (0.75, 0.25, 0.05, False, "-0.5", True),
        (0.50, 0.64, 0.05, True, "+0.14", None),  # two standard errors of the difference are 0.1414
        (0.50, 0.65, 0.05, True, "+0.15", True),
        (0.25, 0.75, None, True, "+0.5", None),
        (0.25, 0.75, math.nan, True, "+0.5", None),
        (2.0, math.nan, 0.05, False, "+nan", None),
        (0.25, 0.75, 0.05, None, "+0.5", None),
    ],
)
def test_change_counts_beyond_two_standard_errors_of_the_difference(
    start: float, trained: float, error: float | None, higher_is_better: bool | None, change: str, better: bool | None
):
    (row,) = evaluation_rows(
        [result("start", start, error, higher_is_better), result("trained", trained, error, higher_is_better)]
    )
    assert (row["change"], row["better"], row["prompts_differ"]) == (change, better, False)


@pytest.mark.parametrize(("start", "trained", "differ"), [(None, "a", True), ("b", "a", True), ("a", "a", False)])
def test_different_prompts_are_marked_and_their_change_is_not_called_better(
    start: str | None, trained: str | None, differ: bool
):
    (row,) = evaluation_rows(
        [result("start", 0.25, 0.01, template=start), result("trained", 0.75, 0.01, template=trained)]
    )
    assert (row["change"], row["prompts_differ"], row["better"]) == ("+0.5", differ, None if differ else True)


def test_commits_of_the_data_are_shown_and_a_change_on_other_data_is_not_called_better():
    first, second = (f"org/quiz@{digit * 40}" for digit in "ab")
    (same,) = evaluation_rows(
        [result(model, value, 0.01, data=[first]) for model, value in (("start", 0), ("trained", 1))]
    )
    assert (same["data"], same["better"]) == ("org/quiz@aaaaaaaa", True)
    (other,) = evaluation_rows([result("start", 0, 0.01, data=[first]), result("trained", 1, 0.01, data=[second])])
    assert (other["data"], other["better"]) == ("org/quiz@aaaaaaaa, org/quiz@bbbbbbbb", None)


def test_model_without_a_start_has_no_change():
    (row,) = evaluation_rows([result("trained", 0.5, 0.125)])
    assert (row["trained"], row["start"], row["change"], row["better"]) == ("0.5 ± 0.12", "–", "–", None)
    assert (row["task"], row["metric"], row["documents"], row["data"]) == ("quiz", "acc", 50, "–")
