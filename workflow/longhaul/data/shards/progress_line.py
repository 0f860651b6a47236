"""Prints the progress of tokenizing: bytes, documents, tokens per second, time left."""

from __future__ import annotations

import sys
import time
from multiprocessing.context import BaseContext

_INTERVAL_S = 5.0
_BYTES, _DOCUMENTS, _TOKENS = range(3)


class ProgressCounters:
    """Finished bytes of sources, documents and tokens, in shared memory; pass it to processes when they start."""

    def __init__(self, context: BaseContext) -> None:
        self._counts = context.Array("q", 3)

    def add(self, source_bytes: int, documents: int, tokens: int) -> None:
        """Add a finished batch."""
        with self._counts.get_lock():
            for index, count in enumerate((source_bytes, documents, tokens)):
                self._counts[index] += count

    def read(self) -> list[int]:
        """Return [bytes, documents, tokens]."""
        with self._counts.get_lock():
            return self._counts[:]


class ProgressPrinter:
    """Prints what is done, the rate, and the estimated time for the rest."""

    interval_s = _INTERVAL_S

    def __init__(self, name: str, total_bytes: int, counters: ProgressCounters) -> None:
        self._name, self._total_bytes, self._counters = name, total_bytes, counters
        self._started_s, self._before = time.monotonic(), counters.read()

    @property
    def has_documents(self) -> bool:
        """True once a document is finished."""
        return self._counters.read()[_DOCUMENTS] > self._before[_DOCUMENTS]

    def show(self) -> None:
        """Print one line."""
        counts = [now - before for now, before in zip(self._counters.read(), self._before, strict=True)]
        elapsed_s = max(time.monotonic() - self._started_s, 1e-3)
        rate_mb_s = counts[_BYTES] / 1e6 / elapsed_s
        left_s = (self._total_bytes - counts[_BYTES]) / 1e6 / max(rate_mb_s, 1e-6)
        print(
            f"tokenize {self._name}: {counts[_DOCUMENTS]:,} documents, "
            f"{counts[_BYTES] / 1e6:.1f} of {self._total_bytes / 1e6:.1f} MB, {counts[_TOKENS]:,} tokens, "
            f"{rate_mb_s:.1f} MB/s, {left_s:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
