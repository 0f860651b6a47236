"""What a model that only counts tokens would reach: the level that a training's loss is drawn beside."""

from __future__ import annotations

import numpy as np

from longhaul.data.shards.indexed_dataset import SplitReader

# Short stretches and many: neighbours are alike, and few long stretches miss what other documents are about. Counting every
# token would take as long as hashing the shards.
_SAMPLED_TOKENS, _STRETCHES = 1 << 20, 1 << 10


def unigram_entropy(split: SplitReader) -> float:
    """Entropy, in nats, of the frequencies of tokens in the loss; of larger splits an estimate from an even sample.

    It adds what a sample of N tokens of K kinds lacks on average, (K - 1) / 2N (Miller, 1955).
    """
    count = split.token_count
    if count <= _SAMPLED_TOKENS:
        return entropy(np.bincount(split.loss_tokens(0, count)))
    length = _SAMPLED_TOKENS // _STRETCHES
    starts = [number * (count - length) // (_STRETCHES - 1) for number in range(_STRETCHES)]
    counts = np.bincount(np.concatenate([split.loss_tokens(start, start + length) for start in starts]))
    return entropy(counts) + max(0, np.count_nonzero(counts) - 1) / (2 * max(1, counts.sum()))


def entropy(counts: np.ndarray) -> float:
    """In nats, of what occurs so often; counts [any]."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())
