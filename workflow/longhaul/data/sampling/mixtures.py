"""Several datasets in fixed proportions: which of them place n of the endless row of samples comes from.

The order is R. Tijdeman's ("The chairman assignment problem", 1980): with K datasets, after any number of places each has
been drawn within 1 - 1 / (2K - 2) of its share. Weights are ratios of whole numbers, so the order repeats itself, and a
table of one period answers for any place. K datasets, P places a period.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from longhaul.artifacts.files import content_hash
from longhaul.artifacts.schemas import DataManifest
from longhaul.config.mixture_weights import whole_weights
from longhaul.jobs.specs import TokenizeSpec


def run(job: TokenizeSpec) -> None:
    """Writes the manifest of a mixture: those of its parts and their weights; no token is copied."""
    parts = {name: DataManifest.read(Path(job.parts[name])) for name in job.dataset.mixture}
    counts = whole_weights(job.dataset.mixture)
    shares = {name: count / sum(counts.values()) for name, count in counts.items()}
    first = next(iter(parts.values()))
    DataManifest(
        dataset=job.name,
        kind=first.kind,
        path=job.folder,
        hash=content_hash([[count, parts[name].hash] for name, count in counts.items()]),
        tokenizer_hash=first.tokenizer_hash,
        dtype=first.dtype,
        splits={split: _sum([part.splits[split] for part in parts.values()]) for split in first.splits},
        sources=[source for part in parts.values() for source in part.sources],
        skipped={},
        unigram_entropy_nats=sum(shares[name] * part.unigram_entropy_nats for name, part in parts.items()),
        mixture=[{"weight": counts[name], "manifest": dataclasses.asdict(part)} for name, part in parts.items()],
    ).write(Path(job.out))


def _sum(entries: list[dict[str, Any]]) -> dict[str, Any]:
    totals = {key: sum(entry[key] for entry in entries) for key in ("tokens", "documents", "loss_tokens")}
    return {"shards": [], **totals}


class Order:
    """Place -> (dataset, how many places it had before)."""

    def __init__(self, weights: Sequence[int]) -> None:
        self._weights = np.array(weights, dtype=np.int64)
        self._period = _period(list(weights))
        self._ranks = np.zeros(len(self._period), dtype=np.int64)
        for part in range(len(weights)):
            chosen = self._period == part
            self._ranks[chosen] = np.arange(int(chosen.sum()))

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For places [N]: datasets [N], and each place's number among those of its dataset [N]; int64."""
        rounds, within = np.divmod(places, len(self._period))
        parts = self._period[within]
        return parts, rounds * self._weights[parts] + self._ranks[within]


def _period(weights: list[int]) -> np.ndarray:
    """[P] int64. `lag` is P times what a dataset is behind its share; of those far enough behind, the most pressing."""
    total, slack = sum(weights), max(1, 2 * len(weights) - 2)
    drawn, order = [0] * len(weights), []
    for place in range(1, total + 1):
        lags = [weight * place - total * count for weight, count in zip(weights, drawn, strict=True)]
        ready = [part for part, lag in enumerate(lags) if slack * lag >= total or len(weights) == 1]
        chosen = min(ready, key=lambda part: Fraction(slack * (total - lags[part]) - total, weights[part]))
        drawn[chosen] += 1
        order.append(chosen)
    return np.array(order, dtype=np.int64)
