"""Receives SIGTERM, SIGINT and SIGHUP for the supervisor: scancel, requeue, preemption, time limit, a closed terminal."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Handler = Callable[[int, FrameType | None], object] | int | None
"""Type that signal.signal returns."""


class TerminationSignals:
    """Records SIGTERM, SIGINT and SIGHUP during a `with` block, and calls `on_signal` for each. nohup's ignored SIGHUP stays.

    The supervisor does not exit at once: its steps save and exit first, then it decides how the allocation ends.
    """

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self._on_signal = on_signal
        self._previous: dict[signal.Signals, Handler] = {}
        self.received: int | None = None
        """Number of the last signal; None if there was none."""
        self.cause = ""
        """Why the job is to end, for its records."""

    def __enter__(self) -> TerminationSignals:
        ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        caught = [number for number in _NUMBERS if number != signal.SIGHUP or not ignores_hangup]
        self._previous = {number: signal.signal(number, self._handle) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._end(number, f"stopped by a user or a signal ({signal.Signals(number).name})")

    def end_with_main_process(self) -> None:
        """Act as if SIGTERM had come: the main process, which would have sent it, was killed."""
        self._end(signal.SIGTERM, "the main process of the run was killed")

    def _end(self, number: int, cause: str) -> None:
        self.received, self.cause = number, cause
        self._on_signal()
