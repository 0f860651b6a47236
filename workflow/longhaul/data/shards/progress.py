"""One line of progress on stderr, a few times a minute, from counters that worker processes share."""

from __future__ import annotations

import sys
import time
from multiprocessing.context import BaseContext
from typing import Any

_EVERY_S = 5.0
_BYTES, _DOCUMENTS, _TOKENS = range(3)


class Counters:
    """Bytes of source, documents and tokens done; may be handed to processes as they start."""

    def __init__(self, context: BaseContext) -> None:
        self._counts: Any = context.Array("q", 3)

    def add(self, source_bytes: int, documents: int, tokens: int) -> None:
        """Notes a finished batch."""
        with self._counts.get_lock():
            for index, count in enumerate((source_bytes, documents, tokens)):
                self._counts[index] += count

    def read(self) -> list[int]:
        """[bytes, documents, tokens]."""
        with self._counts.get_lock():
            return list(self._counts)


class Progress:
    """Knows how many bytes there are, and from the rate how long the rest will take."""

    every_s = _EVERY_S

    def __init__(self, name: str, total_bytes: int, counters: Counters) -> None:
        self._name, self._total_bytes, self._counters = name, total_bytes, counters
        self._started_s, self._before = time.monotonic(), counters.read()

    @property
    def has_begun(self) -> bool:
        """Whether any document is done."""
        return self._counters.read()[_DOCUMENTS] > self._before[_DOCUMENTS]

    def show(self) -> None:
        """Prints the line."""
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
