"""Says, for plan and trainer, which decoder layers each rank of a pipeline has: as even as possible."""

from __future__ import annotations

import itertools


def layers_per_pipeline_rank(layers: int, pipeline_ranks: int) -> list[range]:
    """Return the decoder layers of each pipeline rank: consecutive, and as even as possible; the first ranks get one more."""
    base, remainder = divmod(layers, pipeline_ranks)
    starts = [rank * base + min(rank, remainder) for rank in range(pipeline_ranks + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]
