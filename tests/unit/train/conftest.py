"""A fixture for tests that look at graphs which torch.compile captures: pytestmark = pytest.mark.usefixtures("dynamo")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Enable Dynamo, and forget graphs of earlier tests; yield its counters."""
    import torch._dynamo

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()
