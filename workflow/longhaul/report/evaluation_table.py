"""Compares the scores of a trained model with those of the model that its stage started from, for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from longhaul.artifacts.evaluation_result import EvaluationResult, Score
from longhaul.report.number_format import MISSING

_COMMIT_DIGITS = 8
_SIGNIFICANT = 2.0
"""Standard errors of the difference from which on a change is more than chance."""


def evaluation_rows(results: Sequence[EvaluationResult]) -> list[dict[str, object]]:
    """Return one row per stage, task and metric, in the order of the results.

    prompts_differ: whether the two models read different prompts, as their chat templates differ or one has none
    data:           the repositories of the Hub that the task read, with the first digits of their commits
    better:         whether the change is an improvement; None if it is within two standard errors, if it is no number, if
                    nothing says what better is, or if the prompts or the data differ
    """
    pairs: dict[tuple[str, str], dict[str, EvaluationResult]] = {}
    for result in results:
        pairs.setdefault((result.stage, result.task), {})[result.model] = result
    return [row for pair in pairs.values() for row in _rows(pair)]


def _rows(pair: dict[str, EvaluationResult]) -> list[dict[str, object]]:
    """Return the rows of one evaluation of a stage. pair: the results by model, trained or start"""
    templates = [result.settings.get("chat_template_hash") for result in pair.values()]
    prompts_differ = templates[0] != templates[-1]
    data = [result.data for result in pair.values()]
    shown = ", ".join(sorted({_with_short_commit(revision) for revisions in data for revision in revisions})) or MISSING
    found: dict[tuple[str, str, str], dict[str, Score]] = {}
    for model, result in pair.items():
        for score in result.scores:
            found.setdefault((score["task"], score["metric"], score["filter"]), {})[model] = score
    stage = next(iter(pair.values())).stage
    return [
        {"stage": stage, "data": shown}
        | _row(scores.get("trained"), scores.get("start"), prompts_differ, data_differ=data[0] != data[-1])
        for scores in found.values()
    ]


def _with_short_commit(revision: str) -> str:
    repository, _, commit = revision.rpartition("@")
    return f"{repository}@{commit[:_COMMIT_DIGITS]}"


def _row(trained: Score | None, start: Score | None, prompts_differ: bool, data_differ: bool) -> dict[str, object]:
    known = trained or start
    assert known is not None
    is_compared = trained is not None and start is not None
    is_comparable = not (prompts_differ or data_differ)
    filtered = "" if known["filter"] == "none" else f" ({known['filter']})"
    return {
        "task": known["task"],
        "metric": known["metric"] + filtered,
        "documents": known["documents"],
        "trained": _value(trained),
        "start": _value(start),
        "change": f"{trained['value'] - start['value']:+.4g}" if trained and start else MISSING,
        "prompts_differ": is_compared and prompts_differ,
        "better": _is_better(trained, start) if trained and start and is_comparable else None,
    }


def _value(score: Score | None) -> str:
    if score is None:
        return MISSING
    error = score["standard_error"]
    return f"{score['value']:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def _is_better(trained: Score, start: Score) -> bool | None:
    error, start_error = trained["standard_error"], start["standard_error"]
    if trained["higher_is_better"] is None or error is None or start_error is None:
        return None
    change, margin = trained["value"] - start["value"], _SIGNIFICANT * math.hypot(error, start_error)
    if not abs(change) > margin:  # also where a diverged model has a score or an error that is no number
        return None
    return (change > 0) == trained["higher_is_better"]
