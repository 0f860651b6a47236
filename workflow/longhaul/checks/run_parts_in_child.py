"""Runs the parts of a check in a child process, and ends the child when a step takes longer than its limit.

Nothing can interrupt a call into CUDA on a broken GPU, a read from a mount without its server, or an import of a driver's
library that keeps Python's lock. So a child makes these calls, and says before each step what it does. The process that waits
for it uses neither GPUs nor disks: it kills the child, keeps what the child has found, and lets a new child go on with the parts
that use something else. Linux may keep the killed child until the disk or the GPU answers; nobody waits for that.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import psutil

from longhaul.errors import UserError, first_line
from longhaul.runtime.process_rank import exit_without_cleanup
from longhaul.runtime.process_tree import signal_at_end_of_parent

_REAPED_S, _POLL_INTERVAL_S = 1.0, 0.01
"""A killed process that has not ended after this time is left behind."""
_RELEASED_S = 30.0
"""A process that ends by itself may need so long to release its GPUs, which the job's next step opens."""


@dataclass(frozen=True)
class Subject:
    """A resource that steps of a check use, and the seconds that a step may take: far more than a slow but healthy node needs."""

    name: str
    limit_s: float
    remedy: str


@dataclass(frozen=True)
class Step:
    """One step. gpus: the GPUs that it uses by torch's numbers, where it uses some of them alone."""

    text: str
    subject: Subject
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Part:
    """A part of a check. run: gets the results of the parts before it, by their names; those that did not end are missing."""

    name: str
    first_step: Step
    run: Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class HungStep:
    """A step that did not end, or that ended its process. reason: `no end after 120 s, the limit is 120 s`"""

    step: Step
    reason: str


@dataclass(frozen=True)
class _Result:
    value: Any


@dataclass(frozen=True)
class _Error:
    """An exception. Its parts cross the pipe, as errors with arguments of their own cannot be copied by pickle."""

    kind: type[Exception]
    arguments: tuple[Any, ...]
    attributes: dict[str, Any]

    def rebuilt(self) -> Exception:
        error = self.kind.__new__(self.kind, *self.arguments)
        error.__dict__.update(self.attributes)
        return error


class _Announcer:
    """The pipe to the waiting process; None in a process that nobody watches."""

    pipe: Connection | None = None
    subject: Subject | None = None


def announce(text: str, gpus: Sequence[int] = (), subject: Subject | None = None) -> None:
    """Tell the waiting process which step begins. subject: what it uses, where that differs from the part's first step."""
    used = subject or _Announcer.subject
    if _Announcer.pipe and used:
        _Announcer.pipe.send(Step(text, used, tuple(gpus)))


def run_parts(parts: Sequence[Part]) -> tuple[dict[str, Any], list[HungStep]]:
    """Return the results of the parts by their names, and the steps that did not end.

    After such a step, parts whose first step uses the same subject are left out: they would hang, too.

    Raises:
        Exception: that of a part.
    """
    results, hung, waiting = dict[str, Any](), list[HungStep](), list(parts)
    while waiting:
        ended, found = _run_in_child(waiting, results)
        if found is None:
            break
        hung.append(found)
        bad = {one.step.subject for one in hung}
        waiting = [part for part in waiting[ended + 1 :] if part.first_step.subject not in bad]
    return results, hung


def _run_in_child(parts: Sequence[Part], results: dict[str, Any]) -> tuple[int, HungStep | None]:
    """Run the parts, and add their results. Return how many ended, and the step that did not."""
    reader, writer = Pipe(duplex=False)
    _flush()  # else the child would print it again
    parent, child = os.getpid(), os.fork()
    if child == 0:
        reader.close()
        _serve(parts, results, writer, parent)
    writer.close()
    step, since_s, ended, is_over = parts[0].first_step, time.monotonic(), 0, False
    try:
        while ended < len(parts):
            if not reader.poll(max(0.0, since_s + step.subject.limit_s - time.monotonic())):
                waited_s = time.monotonic() - since_s
                reason = f"no end after {waited_s:.3g} s, the limit is {step.subject.limit_s:g} s"
                return ended, HungStep(step, reason)
            message = _received(reader)
            if message is None:
                return ended, HungStep(step, f"its process ended by {_end_of(child)}")
            if isinstance(message, _Error):
                is_over = True
                raise message.rebuilt()
            if isinstance(message, _Result):
                results[parts[ended].name] = message.value
                ended += 1
                is_over = ended == len(parts)
            step, since_s = message if isinstance(message, Step) else step, time.monotonic()
    finally:
        reader.close()
        if is_over:
            _reaped(child, _RELEASED_S)
        _end(child)
    return ended, None


def _received(reader: Connection) -> Step | _Result | _Error | None:
    """Return the child's next message; None where it has ended."""
    with suppress(EOFError, OSError):  # OSError: it was killed in the middle of a message
        return reader.recv()
    return None


def _serve(parts: Sequence[Part], results: dict[str, Any], pipe: Connection, parent: int) -> NoReturn:
    """Run the parts in this child, send their results, and end."""
    signal_at_end_of_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)
    _Announcer.pipe = pipe
    try:
        for part in parts:
            _Announcer.subject = part.first_step.subject
            pipe.send(part.first_step)
            results[part.name] = part.run(results)
            _flush()
            pipe.send(_Result(results[part.name]))
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()  # it does not cross the pipe
        _flush()
        _send_error(error, pipe)
    except BaseException:  # sys.exit in a library, or Ctrl-C
        traceback.print_exc()
        exit_without_cleanup(1)
    finally:
        exit_without_cleanup()


def _send_error(error: Exception, pipe: Connection) -> None:
    """Send an error, or its text where its class or what it holds cannot be copied."""
    with suppress(Exception):
        arguments: Any = error.__reduce__()[1]  # of an OSError, error.args lack the path
        copy = _Error(type(error), arguments, error.__dict__)
        if str(copy.rebuilt()) == str(error):
            pipe.send(copy)
            return
    pipe.send(_Error(RuntimeError, (f"{type(error).__name__}: {first_line(error)}",), {}))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _end_of(child: int) -> str:
    """Return by what a child has ended whose end of the pipe is closed."""
    status = _reaped(child)
    if status is None:  # it is not out of the kernel yet
        return "a signal"
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        return "SIGKILL, which Linux sends where memory runs out"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _end(child: int) -> None:
    """Kill a child that still runs, and what it has started, such as a compiler."""
    with suppress(ChildProcessError, psutil.NoSuchProcess):
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        process = psutil.Process(child)
        for one in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        _reaped(child)


def _reaped(child: int, seconds: float = _REAPED_S) -> int | None:
    """Return the status of an ended child; None if it does not end in this time, or was asked for before."""
    deadline = time.monotonic() + seconds
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return status
            time.sleep(_POLL_INTERVAL_S)
    return None
