"""Fields of one sample: input_ids, shifted labels, position_ids that restart at each document, the ignored label -100, padding.

S = sequence length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

IGNORED_LABEL = -100
"""The label of positions that do not count in the loss: `ignore_index` of PyTorch's cross entropy."""


class Sample(NamedTuple):
    """One sequence, all arrays [S] int64.

    labels[t] is the token that position t has to predict (already shifted), or IGNORED_LABEL where it does not count in
    the loss. position_ids restart at 0 with every conversation of a pack. In the padding after the last conversation they are
    negative and end with -1: the padding is a document of its own, and mixtures of experts do not count its tokens. A window of
    text has no document borders; the padding of the last one has the next positions.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


def clear_sample(sample: Sample, pad_id: int) -> None:
    """Fill a sample with padding: no position counts in the loss."""
    sample.input_ids[:] = pad_id
    sample.labels[:] = IGNORED_LABEL
    sample.position_ids[:] = np.arange(len(sample.position_ids))
