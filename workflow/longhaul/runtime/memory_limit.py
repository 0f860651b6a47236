"""Limits the memory of code that a user's file decides, such as a chat template."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class MemoryExceeded(Exception):
    """The code asked for more memory than its limit."""


@contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Raise MemoryExceeded in the block when this process asks for so many bytes more than it has at the block's start.

    The limit is that of the whole process, so the block has none outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space_bytes() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield
    except MemoryError:
        raise MemoryExceeded(f"it needs more than {more_bytes / 1e9:g} GB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_bytes() -> int:
    """Return what RLIMIT_AS counts. Without pathlib: a conversation renders in 100 µs, and this must not cost many of them."""
    descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(descriptor, 64).split(maxsplit=1)[0]) * _PAGE_BYTES
    finally:
        os.close(descriptor)
