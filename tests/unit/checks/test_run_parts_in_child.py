"""A step that hangs costs its part alone: the others report, and the check ends. Steps run in a real child process."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import TypeAdapter

from longhaul.checks import run_parts_in_child
from longhaul.checks.run_parts_in_child import HungStep, Part, Step, Subject, announce, run_parts
from longhaul.errors import BadNodesError
from longhaul.runtime.failure_reports import classify_error
from longhaul.runtime.process_rank import Rank

DISK, GPUS = Subject("disk", 1.0, "look at the mount"), Subject("GPUs", 1.0, "replace the GPU")


def part(name: str, run: Callable[[dict[str, Any]], Any], subject: Subject = DISK) -> Part:
    return Part(name, Step(f"first step of {name}", subject), run)


def test_parts_see_results_of_earlier_ones_and_share_a_process():
    parts = [part("one", lambda _: os.getpid()), part("two", lambda found: (found["one"], os.getpid()))]
    results, hung = run_parts(parts)
    assert hung == [] and results["two"] == (results["one"],) * 2 and results["one"] != os.getpid()


def keep_pythons_lock() -> None:
    """Never return, and let no other thread of Python run, as a call into CUDA that opens a GPU."""
    ctypes.PyDLL(None).sleep(600)


def ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)


@pytest.mark.parametrize("hang", [keep_pythons_lock, ignore_signals], ids=lambda hang: hang.__name__)
def test_hung_step_is_named_and_what_uses_something_else_goes_on(hang: Callable[[], None]):
    def copy(_: dict[str, Any]) -> None:
        announce("copies between two GPUs", [2, 5])
        hang()

    parts = [
        part("before", lambda _: "kept", GPUS),
        part("pairs", copy, GPUS),
        part("more", lambda _: pytest.fail("it would hang, too"), GPUS),
        part("disk", lambda found: found["before"]),
    ]
    results, hung = run_parts(parts)
    assert results == {"before": "kept", "disk": "kept"}
    assert [one.step for one in hung] == [Step("copies between two GPUs", GPUS, (2, 5))]
    assert hung[0].reason.startswith("no end after 1") and hung[0].reason.endswith(" s, the limit is 1 s")


def test_each_step_has_the_limit_for_itself():
    def slow(_: dict[str, Any]) -> str:
        for number in range(6):
            announce(f"step {number}")
            time.sleep(0.25)  # together longer than the limit
        return "done"

    assert run_parts([part("slow", slow)]) == ({"slow": "done"}, [])


def test_step_of_another_subject_hides_the_parts_of_that_one():
    def opens_gpus(_: dict[str, Any]) -> None:
        announce("matrix products", [1], GPUS)
        time.sleep(600)

    results, hung = run_parts([part("state", opens_gpus), part("copy", lambda _: 1, GPUS), part("disk", lambda _: 2)])
    assert results == {"disk": 2} and [one.step.subject for one in hung] == [GPUS]


def test_read_from_a_server_that_stopped_is_named(tmp_path: Path):
    """A FIFO without a writer stands for a mount without its server: open(2) does not return."""
    os.mkfifo(tmp_path / "mount")
    read = part("read", lambda _: (tmp_path / "mount").read_bytes())
    results, hung = run_parts([read, part("gpus", lambda _: 8, GPUS)])
    assert results == {"gpus": 8} and [one.step.text for one in hung] == ["first step of read"]


def test_what_a_hung_step_started_ends_with_it():
    def start(_: dict[str, Any]) -> None:
        child = subprocess.Popen(["sleep", "600"])
        announce(f"child {child.pid}")
        child.wait()

    _, hung = run_parts([part("command", start)])
    number = int(hung[0].step.text.removeprefix("child "))
    with suppress(psutil.NoSuchProcess):  # it stays as a zombie where nothing adopts it
        assert psutil.Process(number).status() == psutil.STATUS_ZOMBIE


def test_step_that_ends_its_process_is_named():
    def crash(_: dict[str, Any]) -> None:
        announce("matrices", [3])
        os.kill(os.getpid(), signal.SIGKILL)

    results, hung = run_parts([part("load", crash, GPUS), part("disk", lambda _: 1)])
    assert results == {"disk": 1}
    reason = "its process ended by SIGKILL, which Linux sends where memory runs out"
    assert hung == [HungStep(Step("matrices", GPUS, (3,)), reason)]


def test_error_of_a_part_is_raised_as_it_is():
    def fail(_: dict[str, Any]) -> None:
        raise BadNodesError("n1 is bad", "exclude it", {"n1": "bad"})

    with pytest.raises(BadNodesError, match="n1 is bad") as raised:
        run_parts([part("part", fail)])
    assert (raised.value.nodes, raised.value.hint) == ({"n1": "bad"}, "exclude it")


def raise_unknown_class() -> None:
    class Unknown(Exception):
        pass

    raise Unknown("its class cannot be found by pickle")


def raise_end_of_file() -> None:
    raise EOFError("short file")


def raise_with_lock() -> None:
    error = ValueError("it holds what pickle refuses")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    raise error


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "path of a file": (Path("/no/file").read_bytes, FileNotFoundError, "No such file or directory: '/no/file'"),
    "end of a file, not of the pipe": (raise_end_of_file, EOFError, "short file"),
    "text that __init__ makes": (b"\xff".decode, RuntimeError, "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff"),
    "class of a function": (raise_unknown_class, RuntimeError, "Unknown: its class cannot be found by pickle"),
    "lock": (raise_with_lock, RuntimeError, "ValueError: it holds what pickle refuses"),
    "class without __new__": (lambda: TypeAdapter(int).validate_python("x"), RuntimeError, "ValidationError: 1 validation"),
}  # fmt: skip


@pytest.mark.parametrize(("fail", "kind", "text"), ERRORS.values(), ids=ERRORS)
def test_error_that_cannot_be_copied_is_no_hung_step(fail: Callable[[], object], kind: type[Exception], text: str):
    with pytest.raises(kind, match=re.escape(text)) as raised:
        run_parts([part("part", lambda _: fail())])
    assert type(raised.value) is kind


def test_disk_that_is_full_is_named_with_its_folder(tmp_path: Path):
    def fail(_: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "file"))

    with pytest.raises(OSError, match="No space left") as raised:
        run_parts([part("part", fail)])
    assert classify_error(raised.value, Rank(0, 1, 0, 1, "n1")).needed_in == str(tmp_path)


def test_part_that_calls_exit_is_named_with_a_traceback(capfd: pytest.CaptureFixture[str]):
    results, hung = run_parts([part("part", lambda _: sys.exit(0)), part("more", lambda _: 1, GPUS)])
    assert results == {"more": 1} and [one.reason for one in hung] == ["its process ended by exit code 1"]
    assert "SystemExit: 0" in capfd.readouterr().err


def test_parts_end_when_their_process_has_released_what_it_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The next step of the job opens the same GPUs. Here the end of the process touches a file."""

    def end_slowly() -> None:
        time.sleep(1.5)
        (tmp_path / "released").touch()
        os._exit(0)

    monkeypatch.setattr(run_parts_in_child, "exit_without_cleanup", end_slowly)
    run_parts([part("part", lambda _: 1)])
    assert (tmp_path / "released").exists()


def test_message_that_the_kill_cuts_off_is_no_error():
    def die_in_the_middle(_: dict[str, Any]) -> None:
        pipe = run_parts_in_child._Announcer.pipe
        assert pipe
        os.write(pipe.fileno(), (1000).to_bytes(4, "big") + b"half of a message")
        os.kill(os.getpid(), signal.SIGKILL)

    _, hung = run_parts([part("part", die_in_the_middle)])
    assert "SIGKILL" in hung[0].reason
