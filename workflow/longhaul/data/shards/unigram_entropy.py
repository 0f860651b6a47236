"""Computes the entropy of token frequencies: the loss of a model that only counts, drawn in the report."""

from __future__ import annotations

import numpy as np

from longhaul.data.shards.shard_reader import SplitReader

# Many short ranges instead of a few long ones: neighbouring tokens are similar, and few ranges miss the topics of other
# documents. Counting every token would take as long as hashing the shards.
_SAMPLED_TOKENS, _SAMPLED_RANGES = 1 << 20, 1 << 10


def unigram_entropy(split: SplitReader) -> float:
    """Return the entropy, in nats, of the frequencies of loss tokens; an estimate from an even sample for large splits.

    A sample of N tokens of K kinds underestimates the entropy by (K - 1) / 2N on average (Miller, 1955); the estimate
    adds this term.
    """
    count = split.token_count
    if count <= _SAMPLED_TOKENS:
        return entropy(np.bincount(split.loss_tokens(0, count)))
    length = _SAMPLED_TOKENS // _SAMPLED_RANGES
    starts = [number * (count - length) // (_SAMPLED_RANGES - 1) for number in range(_SAMPLED_RANGES)]
    counts = np.bincount(np.concatenate([split.loss_tokens(start, start + length) for start in starts]))
    return entropy(counts) + max(0, np.count_nonzero(counts) - 1) / (2 * max(1, counts.sum()))


def entropy(counts: np.ndarray) -> float:
    """Return the entropy, in nats, of a distribution given by counts [any]."""
    frequencies = counts[counts > 0] / max(1, counts.sum())
    return float(-(frequencies * np.log(frequencies)).sum())
