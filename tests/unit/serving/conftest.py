"""Fixtures of the tests of servers."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from tests.support.wait import is_alive


def living_children() -> set[psutil.Process]:
    return {child for child in psutil.Process().children() if is_alive(child)}


@pytest.fixture
def no_new_process() -> Iterator[None]:
    """Fail if the test leaves a child process."""
    before = living_children()
    yield
    assert living_children() <= before
