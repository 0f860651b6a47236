"""One line of progress on stderr, a few times a minute."""

from __future__ import annotations

import sys
import time

_EVERY_S = 5.0


class Progress:
    """Counts documents and tokens; knows from the files' sizes how much is left."""

    def __init__(self, name: str, file_bytes: list[int]) -> None:
        self.total_bytes = sum(file_bytes)
        self._name, self._file_bytes = name, file_bytes
        self._documents = self._tokens = 0
        self._read_bytes = 0.0
        self._started_s = self._shown_s = time.monotonic()

    def add(self, documents: int, tokens: int, file_index: int, read_share: float) -> None:
        """Notes a finished batch whose last document stands at `read_share` of file `file_index`."""
        self._documents += documents
        self._tokens += tokens
        self._read_bytes = sum(self._file_bytes[:file_index]) + read_share * self._file_bytes[file_index]
        if time.monotonic() - self._shown_s >= _EVERY_S:
            self._show()

    def finish(self) -> None:
        """Shows the last line, whenever the one before was."""
        self._show()

    def _show(self) -> None:
        self._shown_s = time.monotonic()
        elapsed_s = max(self._shown_s - self._started_s, 1e-3)
        left_s = elapsed_s * (self.total_bytes - self._read_bytes) / max(self._read_bytes, 1)
        print(
            f"tokenize {self._name}: {self._documents:,} documents, "
            f"{self._read_bytes / 1e6:.1f} of {self.total_bytes / 1e6:.1f} MB, {self._tokens:,} tokens, "
            f"{self._read_bytes / 1e6 / elapsed_s:.1f} MB/s, {left_s:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
