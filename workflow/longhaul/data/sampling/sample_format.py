"""Fields of one sample: input_ids, shifted labels, position_ids that restart at each document, the ignored label -100, padding.

S = sequence length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

IGNORED_LABEL = -100
"""The label of positions that do not count in the loss: `ignore_index` of PyTorch's cross entropy."""


class Sample(NamedTuple):
    """One sequence, all arrays [S] int64.

    labels[t] is the token that position t has to predict (already shifted), or IGNORED_LABEL where it does not count in
    the loss. position_ids restart at 0 with every conversation of a pack. Mixtures of experts do not count padding, so its
    positions have values that no token has: -S to -1 (`is_text`). The padding of a pack is a document of its own. A window of
    text has no document borders, because they would need an attention mask of S x S entries; where a window ends in padding,
    its first position is so low that the padding begins with -S. Rotary embeddings depend on differences of positions alone.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


def is_text(position_ids: Any, sequence_length: int) -> Any:
    """Return which positions hold a token: a boolean array or tensor of the shape of `position_ids`."""
    return (position_ids >= 0) | (position_ids < -sequence_length)


def clear_sample(sample: Sample, pad_id: int) -> None:
    """Fill a sample with padding: no position counts in the loss."""
    sample.input_ids[:] = pad_id
    sample.labels[:] = IGNORED_LABEL
    sample.position_ids[:] = np.arange(len(sample.position_ids))
