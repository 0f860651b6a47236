"""Over NCCL, a message that never arrives is an error after a time. The clock and the GPU are simulated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from longhaul.checks import pair_bandwidth
from longhaul.checks.pair_bandwidth import PairMeter


class Event:
    """A point in a GPU's queue that is reached after this number of queries."""

    queries: Iterator[bool]

    def record(self, stream: object) -> None:
        assert stream == "stream of cuda:0"

    def query(self) -> bool:
        return next(self.queries)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> PairMeter:
    """Return a meter of a GPU whose messages return at once, as over NCCL. Each look at the clock takes a second."""
    seconds = iter(range(1000))
    monkeypatch.setattr(pair_bandwidth.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: [])
    monkeypatch.setattr(dist, "P2POp", lambda *arguments: None)
    made = object.__new__(PairMeter)
    made._device = torch.device("cuda", 0)
    return made


def test_message_that_never_arrives_is_an_error(meter: PairMeter):
    Event.queries = iter([False] * 100)
    with pytest.raises(RuntimeError, match="no message arrived within 30 s"):
        meter._swap(1, torch.zeros(1), torch.zeros(1))
    assert sum(1 for _ in Event.queries) == 100 - 31, "it waits for 30 s and no longer"


def test_message_that_arrives_late_is_none(meter: PairMeter):
    Event.queries = iter([False] * 29 + [True])
    meter._swap(1, torch.zeros(1), torch.zeros(1))
    assert next(Event.queries, None) is None


def test_wait_ends_before_torch_ends_all_processes():
    from longhaul.checks.fabric import _TIMEOUT_S

    assert pair_bandwidth._MOST_WAIT_S < _TIMEOUT_S
