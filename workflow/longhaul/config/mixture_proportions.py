"""Converts a mixture's decimal weights to the smallest whole numbers with the same proportions; refuses too large ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

MAX_PERIOD = 10_000


def whole_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Return the smallest whole numbers with the same proportions; each decimal counts exactly as it is written.

    Raises:
        ValueError: the whole numbers add up to more than MAX_PERIOD samples.
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    scale = math.lcm(*(weight.denominator for weight in exact.values()))
    counts = {name: int(weight * scale) for name, weight in exact.items()}
    divisor = math.gcd(*counts.values())
    counts = {name: count // divisor for name, count in counts.items()}
    if sum(counts.values()) > MAX_PERIOD:
        raise ValueError(
            f"the weights repeat only after {sum(counts.values()):,} samples; the limit is {MAX_PERIOD:,}; round the weights"
        )
    return counts
