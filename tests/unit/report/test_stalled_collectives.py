"""The records of torch's flight recorder name the ranks that did not come to a collective."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.paths import AttemptLogs
from longhaul.errors import UserError
from longhaul.report.read_flight_recorder import RankRecord, read_rank_record
from longhaul.report.stalled_collectives import find_stall, stalled_collectives
from tests.support.launch_ranks import run_worker
from tests.support.run_folder import TRAIN, RunFolder
from tests.unit.report.test_diagnose import found

WORKER = Path(__file__).parents[2] / "support" / "stalled_worker.py"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the records of three real ranks, of which rank 1 did not come; named as those of a first attempt."""
    folder = tmp_path_factory.mktemp("records")
    run_worker(WORKER, 3, AttemptLogs.collective_record_prefix(folder / "attempt-0001.log"))
    return folder


def test_absent_rank_of_real_ranks_is_named(records: Path):
    (finding,) = stalled_collectives("train-base", records / "attempt-0001.log", ["n1", "n2", "n3"])
    assert finding.cause.startswith(
        "rank 1 on n2 did not come to all_reduce (4), number 3 of the process group default_pg; 2 ranks waited there for "
    )
    assert 2 <= float(finding.cause.split()[-2]) < 60
    assert finding.remedy.startswith("its last one was barrier, number 2; ") and "3 records" in finding.evidence


def test_doctor_names_it_before_the_lines_that_only_follow(records: Path, tmp_path: Path):
    run = RunFolder(tmp_path)
    run.state(TRAIN, "running")
    logs = run.paths.attempt_logs(TRAIN)
    logs.path.mkdir(parents=True)
    logs.log(1).write_text("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE)\n")
    for path in records.iterdir():
        os.link(path, logs.path / path.name)
    causes = [finding.cause for finding in found(run)]
    (stall,) = (cause for cause in causes if cause.startswith("rank 1"))
    (timeout,) = (cause for cause in causes if cause.startswith("a collective did not end in time"))
    assert causes.index(stall) < causes.index(timeout)


def entry(number: int, name: str = "nccl:all_reduce", state: str = "completed", **changes: Any) -> dict[str, Any]:
    """Return one collective as torch records it under NCCL."""
    return {
        "process_group": ("0", "default_pg"),
        "collective_seq_id": number,
        "profiling_name": name,
        "time_created_ns": 10**18 + number,
        "input_sizes": [[2, 3]],
        "state": state,
        "is_p2p": False,
        **changes,
    }


def record(*entries: dict[str, Any], ranks: int = 4) -> RankRecord:
    return RankRecord(list(entries), {"0": list(range(ranks)), "1": [0, 1]})  # pyright: ignore[reportArgumentType]


def test_nothing_stalls_where_every_collective_has_ended():
    late = record(entry(1), entry(2))  # it was about to call the third one, which the others have not completed either
    assert find_stall({}) is None
    assert find_stall({rank: record(entry(1), entry(2)) for rank in range(4)}) is None
    assert find_stall({**{rank: record(entry(1), entry(2), entry(3)) for rank in range(3)}, 3: late}) is None


def test_all_came_and_it_did_not_end():
    stall = find_stall({rank: record(entry(1), entry(2, state="started")) for rank in range(4)})
    assert stall and stall.absent == [] and stall.cause.startswith("all 4 ranks came to all_reduce (2x3), number 2 of")


def test_rank_without_a_record_is_absent():
    stall = find_stall({rank: record(entry(1, state="started")) for rank in range(3)}, ["n1", "n2"])
    assert stall and stall.absent == [3] and stall.cause.startswith("rank 3 on n2 did not come")
    assert stall.remedy.startswith("it left no record")


def test_group_that_has_waited_longest_counts():
    """Ranks 0 and 1 wait for each other in the group 1, and the others for rank 0 in the default group."""
    pair = {"process_group": ("1", "expert"), "time_created_ns": 10**18}
    found = find_stall(
        {
            0: record(entry(1)),
            1: record(entry(1), entry(1, "nccl:all_to_all", "started", **pair)),
            2: record(entry(1), entry(2, state="started")),
            3: record(entry(1), entry(2, state="started")),
        }
    )
    assert found and found.absent == [0]
    assert (
        found.cause
        == "rank 0 did not come to all_to_all (2x3), number 1 of the process group expert; rank 1 waited there"
    )


def test_different_collectives_are_named():
    ranks = {rank: record(entry(1, state="started")) for rank in range(3)}
    stall = find_stall({**ranks, 3: record(entry(1, "nccl:broadcast", "scheduled"))})
    assert stall and stall.absent == [3] and "ranks 0, 1, 2: all_reduce (2x3); rank 3: broadcast (2x3)" in stall.cause


def test_sends_between_two_ranks_do_not_count():
    ranks = {0: record(entry(1)), 1: record(entry(1), entry(9, "nccl:send 1->0", is_p2p=True))}
    assert find_stall({rank: RankRecord(r.collectives, {"0": [0, 1]}) for rank, r in ranks.items()}) is None


class Command:
    """An object whose pickle runs a command when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Command(), 2), "it holds the opcode GLOBAL"),
        (pickle.dumps({"entries": [Command()]}, 4), "it holds the opcode"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "its memo index 2147483647 exceeds its 9 bytes"),
        (pickle.dumps({"entries": [{"state": 1}], "pg_config": {}}, 2), "entries.0.process_group: Field required"),
        (pickle.dumps({"entries": [], "pg_config": {"0": {"ranks": "import os"}}}, 2), "Expecting value"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00ent", "expected 5 bytes"),
        (b"", "pickle exhausted"),
        (b"text", "opcode b'x' unknown"),
    ],
    ids=["a call", "a call in protocol 4", "a large memo", "a missing field", "no list", "truncated", "empty", "text"],
)
def test_altered_record_is_refused_and_named(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "attempt-0001.log"
    path = Path(f"{AttemptLogs.collective_record_prefix(log)}0")
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rank_record(path)
    (finding,) = stalled_collectives("train-base", log, [])
    assert str(path) in finding.cause and not Path("pwned").exists()
    path.unlink()
    assert stalled_collectives("train-base", log, []) == []


def test_rank_that_was_on_its_way_is_not_accused(tmp_path: Path):
    """Records are written after errors, too, when the ranks are at different places."""
    log = tmp_path / "attempt-0001.log"
    for rank in range(2):
        entries = [entry(1, state="started", time_created_ns=time.time_ns())] if rank else [entry(9, is_p2p=True)]
        content = {"entries": entries, "pg_config": {"0": {"ranks": "[0, 1]"}}}
        Path(f"{AttemptLogs.collective_record_prefix(log)}{rank}").write_bytes(pickle.dumps(content, 2))
    assert stalled_collectives("train-base", log, []) == []
