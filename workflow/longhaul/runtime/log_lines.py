"""Lines of log files: each begins with the time, and has no escape codes of terminals."""

from __future__ import annotations

import atexit
import io
import re
import sys
import threading
import time
from typing import TextIO

_ESCAPE_CODE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
"""A control sequence, an operating system command or a two-byte escape of ECMA-48."""


def stamp_lines() -> None:
    """Write what this process prints from now on as lines with the time, unless it prints to a terminal.

    This holds for what Python prints. Libraries in C, such as NCCL, write to the file itself and add what they add.
    """
    for name in ("stdout", "stderr"):
        stream: TextIO = getattr(sys, name)
        if not isinstance(stream, StampedLines) and not stream.isatty():
            stamped = StampedLines(stream)
            atexit.register(stamped.end_line)
            setattr(sys, name, stamped)


def plain_line(line: str) -> str:
    """Return a line without escape codes. Of a progress bar, which returns to the start of its line, the last state stays."""
    return _ESCAPE_CODE.sub("", line).rstrip("\r").rpartition("\r")[2]


class StampedLines(io.TextIOBase):
    """A text stream that passes complete lines on, each in one write, so that lines of several processes do not mix."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._incomplete, self._lock = stream, "", threading.Lock()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._stream.errors

    @property
    def buffer(self) -> object:
        return self._stream.buffer

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        """Pass the lines of `text` on; keep what follows the last line break."""
        with self._lock:
            *lines, self._incomplete = (self._incomplete + text).split("\n")
            if lines:
                self._stream.write("".join(map(_stamped, lines)))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def end_line(self) -> None:
        """Write a line that has no end yet."""
        if self._incomplete:
            self.write("\n")
            self.flush()


def _stamped(line: str) -> str:
    text = plain_line(line)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n" if text else "\n"
