"""Weights of a mixture as people write them -> whole numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

MAX_PERIOD = 10_000


def whole_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """The smallest whole numbers in the same proportions, the decimals read as written; ValueError beyond MAX_PERIOD."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    scale = math.lcm(*(weight.denominator for weight in exact.values()))
    counts = {name: int(weight * scale) for name, weight in exact.items()}
    divisor = math.gcd(*counts.values())
    counts = {name: count // divisor for name, count in counts.items()}
    if sum(counts.values()) > MAX_PERIOD:
        raise ValueError(
            f"weights repeat after {sum(counts.values()):,} samples; round them: the limit is {MAX_PERIOD:,}"
        )
    return counts
