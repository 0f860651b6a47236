"""Heartbeats: the ranks that count as silent."""

from __future__ import annotations

from longhaul.runtime.heartbeat import HeartbeatCounters


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
