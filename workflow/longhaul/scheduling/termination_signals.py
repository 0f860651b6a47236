"""Receives SIGTERM and SIGINT for the supervisor: scancel, requeue, preemption, time limit."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None
"""Type that signal.signal returns."""


class TerminationSignals:
    """Records SIGTERM and SIGINT during a `with` block, and calls `on_signal` for each.

    The supervisor does not exit at once: its steps save and exit first, then it decides how the allocation ends.
    """

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self._on_signal = on_signal
        self._previous: dict[signal.Signals, Handler] = {}
        self.received: int | None = None
        """Number of the last signal; None if there was none."""

    def __enter__(self) -> TerminationSignals:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._on_signal()
