"""A micro batch counts its tokens, and the pairs that attention computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from longhaul.data.sampling.sample_format import IGNORED_LABEL, Sample
from longhaul.train.batches import collate

PACK = [0, 1, 2, 0, 1, 2, 3, -3, -2, -1]
WINDOW = list(range(10))


class FakeSamples:
    """A pack of conversations of three and four tokens, a full window, and a last window with five tokens."""

    length = 10

    def fill(self, index: int, sample: Sample) -> int:
        positions, tokens = [(PACK, 7), (WINDOW, 10), (WINDOW, 5)][index]
        sample.input_ids[:], sample.labels[:] = 1, IGNORED_LABEL
        sample.position_ids[:] = positions
        return tokens


def test_only_pairs_within_a_document_count():
    """The pack has 1 + 2 + 3 and 1 + 2 + 3 + 4 pairs, the windows 55 and 15; padding has none."""
    samples: Any = FakeSamples()
    found = [collate(samples, np.array(ids)) for ids in ([0], [1], [2], [0, 1, 2])]
    assert [micro.attention_pairs for micro in found] == [16, 55, 15, 86]
    assert [micro.tokens for micro in found] == [7, 10, 5, 22]
    assert [micro.has_several_documents for micro in found] == [True, False, False, True]
