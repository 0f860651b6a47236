"""Finds the ranks that did not come to a collective for `longhaul doctor`, from the records of torch's flight recorder.

Every rank numbers the collectives of a process group. A rank whose last number is lower than that of the others did not
come. Among several process groups, the one that has waited longest counts: the others wait for its ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longhaul.artifacts.paths import AttemptLogs
from longhaul.errors import UserError
from longhaul.report.read_flight_recorder import RankRecord, RecordedCollective, read_rank_record
from longhaul.report.search_logs import Finding

_SHOWN_RANKS = 8
_SHORTEST_WAIT_S = 2.0
"""Records are written after errors, too. A rank that is late by less was on its way."""


@dataclass(frozen=True)
class _Group:
    """The collectives of one process group: rank -> number -> collective. Ranks without a record are `silent`."""

    name: str
    recorded: dict[int, dict[int, RecordedCollective]]
    silent: list[int]

    @property
    def last(self) -> dict[int, int]:
        return {rank: max(numbers, default=0) for rank, numbers in self.recorded.items()}


@dataclass(frozen=True)
class Stall:
    """A collective that did not end.

    absent:  ranks that did not come; empty: all came
    since_ns: when the first rank came, in nanoseconds since 1970
    """

    cause: str
    remedy: str
    absent: list[int]
    since_ns: int


def stalled_collectives(job: str, log: Path, hosts: Sequence[str]) -> list[Finding]:
    """Return what the records of an attempt say about the collective that did not end; nothing without records.

    log:   the attempt's log; the records are beside it
    hosts: the job's nodes in the order of the ranks; empty if they are not known
    """
    paths = AttemptLogs.collective_records(log)
    records: dict[int, RankRecord] = {}
    unreadable: list[Finding] = []
    for rank, path in paths.items():
        try:
            records[rank] = read_rank_record(path)
        except UserError as error:
            unreadable.append(Finding(job, error.message, str(path), error.hint))
    stall = find_stall(records, hosts)
    waited_s = max(path.stat().st_mtime for path in paths.values()) - stall.since_ns / 1e9 if stall else 0.0
    if stall is None or waited_s < _SHORTEST_WAIT_S:
        return unreadable
    evidence = f"{AttemptLogs.collective_record_prefix(log)}*: {len(records)} records of torch's flight recorder"
    return [Finding(job, f"{stall.cause} for {waited_s:.0f} s", evidence, stall.remedy), *unreadable]


def find_stall(records: Mapping[int, RankRecord], hosts: Sequence[str] = ()) -> Stall | None:
    """Return the collective that has waited longest, or None if every rank completed what it recorded.

    records: rank -> what it recorded
    """
    groups = list(_groups(records))
    ranks = sorted({rank for group in groups for rank in (*group.recorded, *group.silent)})
    place = _Places(hosts, len(ranks))
    stalls = [stall for group in groups if (stall := _stall(group, place))]
    return min(stalls, key=lambda stall: (not stall.absent, stall.since_ns), default=None)


def _groups(records: Mapping[int, RankRecord]) -> Iterator[_Group]:
    names = dict.fromkeys(entry["process_group"] for record in records.values() for entry in record.collectives)
    for name, description in names:
        stated = {rank for record in records.values() for rank in record.groups.get(name, ())}
        recorded = {
            rank: {
                entry["collective_seq_id"]: entry
                for entry in record.collectives
                if entry["process_group"][0] == name and not entry["is_p2p"]
            }
            for rank, record in records.items()
        }
        # Without a list of its ranks, those that used the group are its members.
        members = stated or {rank for rank, numbers in recorded.items() if numbers}
        title = description if description not in ("", "undefined") else name
        yield _Group(
            title, {rank: recorded[rank] for rank in sorted(members & set(records))}, sorted(members - set(records))
        )


def _stall(group: _Group, place: _Places) -> Stall | None:
    last = group.last
    if not last or not max(last.values()):
        return None
    behind = [rank for rank, number in last.items() if number < max(last.values())]
    number = min(last.values()) + 1 if behind else max(last.values())
    waiting = {rank: numbers[number] for rank, numbers in group.recorded.items() if number in numbers}
    if not waiting or all(entry["state"] == "completed" for entry in waiting.values()):
        return None
    names = {entry["profiling_name"] for entry in waiting.values()}
    if len(names) > 1:
        return _disagreement(group, number, waiting, place)
    what = f"{_operation(next(iter(waiting.values())))}, number {number} of the process group {group.name}"
    since_ns = min(entry["time_created_ns"] for entry in waiting.values())
    absent = sorted([*(rank for rank in behind if last[rank] < number), *group.silent])
    if absent:
        cause = f"{place.named(absent)} did not come to {what}; {place.counted(waiting)} waited there"
        remedy = f"{_last_of(group, absent)}look at the log of that rank for what it did instead, and check its node"
        return Stall(cause, remedy, absent, since_ns)
    if any(entry["profiling_name"].startswith("gloo:") for entry in waiting.values()):
        return None  # gloo does not record whether a collective ended
    cause = f"all {len(waiting)} ranks came to {what}, which did not end"
    return Stall(cause, "check the network and the GPUs of these nodes: no rank is missing", [], since_ns)


def _disagreement(group: _Group, number: int, waiting: Mapping[int, RecordedCollective], place: _Places) -> Stall:
    by_operation: dict[str, list[int]] = {}
    for rank, entry in waiting.items():
        by_operation.setdefault(_operation(entry), []).append(rank)
    said = "; ".join(f"{place.named(ranks)}: {operation}" for operation, ranks in by_operation.items())
    fewest = min(by_operation.values(), key=len)
    return Stall(
        f"ranks called different collectives as number {number} of the process group {group.name} ({said}), and waited",
        "the ranks ran different code or data: report it, with the records",
        fewest,
        min(entry["time_created_ns"] for entry in waiting.values()),
    )


def _operation(entry: RecordedCollective) -> str:
    name = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
    shapes = ", ".join("x".join(map(str, size)) or "scalar" for size in entry["input_sizes"][:3])
    return f"{name} ({shapes})" if shapes else name


def _last_of(group: _Group, absent: Iterable[int]) -> str:
    rank = next(iter(absent))
    if rank in group.silent:
        return "it left no record: its process had ended, or could not write; "
    number = group.last[rank]
    return f"its last one was {_operation(group.recorded[rank][number])}, number {number}; " if number else ""


class _Places:
    """Names ranks with their nodes. The ranks of a node are consecutive."""

    def __init__(self, hosts: Sequence[str], ranks: int) -> None:
        self._hosts = hosts if hosts and ranks % len(hosts) == 0 else ()
        self._per_host = ranks // len(hosts) if self._hosts else 1

    def named(self, ranks: Sequence[int]) -> str:
        shown = ", ".join(map(str, ranks[:_SHOWN_RANKS]))
        more = f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else ""
        nodes = dict.fromkeys(self._hosts[rank // self._per_host] for rank in ranks if self._hosts)
        on = f" on {', '.join(list(nodes)[:_SHOWN_RANKS])}" if nodes else ""
        return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}{on}"

    @staticmethod
    def counted(ranks: Iterable[int]) -> str:
        """Return how many ranks these are."""
        found = list(ranks)
        return f"rank {found[0]}" if len(found) == 1 else f"{len(found)} ranks"
