"""Compares the scores of a trained model with those of the model that its stage started from, for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from longhaul.artifacts.artifact_schemas import EvaluationResult, Score
from longhaul.report.number_format import MISSING

_SIGNIFICANT = 2.0
"""Standard errors of the difference from which on a change is more than chance."""


def evaluation_rows(results: Sequence[EvaluationResult]) -> list[dict[str, object]]:
    """Return one row per stage, task and metric, in the order of the results.

    better: whether the change is an improvement; None if it is within two standard errors, or nothing says what better is
    """
    found: dict[tuple[str, str, str, str], dict[str, Score]] = {}
    for result in results:
        for score in result.scores:
            key = (result.stage, score["task"], score["metric"], score["filter"])
            found.setdefault(key, {})[result.model] = score
    return [_row(key, scores.get("trained"), scores.get("start")) for key, scores in found.items()]


def _row(key: tuple[str, str, str, str], trained: Score | None, start: Score | None) -> dict[str, object]:
    stage, task, metric, filter_name = key
    known = trained or start
    assert known is not None
    return {
        "stage": stage,
        "task": task,
        "metric": metric if filter_name == "none" else f"{metric} ({filter_name})",
        "documents": known["documents"],
        "trained": _value(trained),
        "start": _value(start),
        "change": f"{trained['value'] - start['value']:+.4g}" if trained and start else MISSING,
        "better": _is_better(trained, start) if trained and start else None,
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
    change = trained["value"] - start["value"]
    if abs(change) <= _SIGNIFICANT * math.hypot(error, start_error):
        return None
    return (change > 0) == trained["higher_is_better"]
