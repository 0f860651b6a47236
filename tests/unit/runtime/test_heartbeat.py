"""Heartbeats: the ranks that count as silent."""

from __future__ import annotations

from longhaul.runtime.heartbeat import HeartbeatCounters, read_counts, send_heartbeat


class CountingStore:
    """A store in memory with the methods of TCPStore that heartbeats use; counts its requests."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.requests = 0

    def add(self, key: str, amount: int) -> int:
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        self.requests += 1
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.requests += 1
        return [str(self.values[key]).encode() for key in keys]


def test_counters_of_all_ranks_take_two_requests():
    store = CountingStore()
    for rank in range(1000):
        send_heartbeat(store, rank)  # type: ignore[arg-type]
    send_heartbeat(store, 7)  # type: ignore[arg-type]
    counts = read_counts(store, 1000)  # type: ignore[arg-type]
    assert counts == {rank: b"2" if rank == 7 else b"1" for rank in range(1000)}
    assert store.requests == 2


def test_ranks_without_a_heartbeat_have_no_counter():
    store = CountingStore()
    send_heartbeat(store, 2)  # type: ignore[arg-type]
    assert read_counts(store, 3) == {2: b"1"}  # type: ignore[arg-type]


def test_rank_whose_counter_stops_is_silent_after_the_timeout():
    counters = HeartbeatCounters(2, heartbeat_timeout_s=10.0)
    assert counters.silent_ranks({0: b"1", 1: b"1"}, 100.0) == []
    assert counters.silent_ranks({0: b"2", 1: b"1"}, 110.0) == [], "exactly the timeout"
    assert counters.silent_ranks({0: b"3", 1: b"1"}, 110.1) == [1]
    assert counters.silent_ranks({0: b"4", 1: b"2"}, 111.0) == [], "it has sent a heartbeat again"


def test_rank_that_never_sent_a_heartbeat_is_silent_after_the_timeout():
    counters = HeartbeatCounters(2, heartbeat_timeout_s=10.0)
    assert counters.silent_ranks({0: b"1"}, 0.0) == []
    assert counters.silent_ranks({0: b"2"}, 10.5) == [1]
