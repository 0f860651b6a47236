"""Orders the samples of a mixture: which dataset each position draws from, in fixed proportions.

The order is R. Tijdeman's ("The chairman assignment problem", 1980): with K datasets, after any number of positions the
number of samples of each dataset differs from its proportion by at most 1 - 1 / (2K - 2). Weights are ratios of whole
numbers, so the order is periodic, and a table of one period is enough to compute any position.
K datasets, P positions per period.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


class MixtureOrder:
    """Maps each position of a mixture to a dataset, and to the number of this dataset's earlier positions."""

    def __init__(self, weights: Sequence[int]) -> None:
        self._weights = np.array(weights, dtype=np.int64)
        self._period = _build_period(list(weights))
        self._ranks = np.zeros(len(self._period), dtype=np.int64)
        for dataset in range(len(weights)):
            is_dataset = self._period == dataset
            self._ranks[is_dataset] = np.arange(int(is_dataset.sum()))

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return, for positions [N], their datasets [N] and their numbers within these datasets [N]; int64."""
        periods, within = np.divmod(positions, len(self._period))
        datasets = self._period[within]
        return datasets, periods * self._weights[datasets] + self._ranks[within]

    def drawn(self, count: int) -> list[int]:
        """Return how many of the first `count` positions each dataset has."""
        periods, rest = divmod(count, len(self._period))
        in_rest = np.bincount(self._period[:rest], minlength=len(self._weights))
        return (periods * self._weights + in_rest).tolist()


def _build_period(weights: list[int]) -> np.ndarray:
    """Return [P] int64, the dataset of each position of one period.

    `lags` are P times the numbers of samples that the datasets are behind their proportions. Of the datasets that are far
    enough behind, the most urgent one is next.
    """
    total, slack = sum(weights), max(1, 2 * len(weights) - 2)
    drawn, order = [0] * len(weights), []
    for position in range(1, total + 1):
        lags = [weight * position - total * count for weight, count in zip(weights, drawn, strict=True)]
        ready = [dataset for dataset, lag in enumerate(lags) if slack * lag >= total or len(weights) == 1]
        chosen = min(ready, key=lambda dataset: Fraction(slack * (total - lags[dataset]) - total, weights[dataset]))
        drawn[chosen] += 1
        order.append(chosen)
    return np.array(order, dtype=np.int64)
