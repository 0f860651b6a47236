"""A server leaves no process: after its use, after errors, and after kill -9 of any process above its workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from longhaul.config.serving_config import Serving
from longhaul.errors import UserError
from longhaul.serving.engines import Server
from longhaul.serving.server_process import free_port, running_server

SLOW_SERVER = Path(__file__).with_name("slow_server.py")


class ServerWithoutModel(Server):
    """Starts slow_server.py, which writes its own pid and its worker's to the file `model`."""

    def command(self, node_rank: int = 0, leader: tuple[str, int] | None = None) -> tuple[str, ...]:
        return (sys.executable, str(SLOW_SERVER), str(self.port), str(self.model))


class FailingServer(Server):
    def command(self, node_rank: int = 0, leader: tuple[str, int] | None = None) -> tuple[str, ...]:
        return (sys.executable, "-c", "import sys; sys.exit(7)")


class SilentServer(ServerWithoutModel):
    """Answers at another port than the one that is asked."""

    @property
    def health_url(self) -> str:
        return f"http://127.0.0.1:{free_port('127.0.0.1')}/health"


def server(kind: type[Server], pids: Path) -> Server:
    return kind(Serving(), pids, "m", "fp32", "127.0.0.1", free_port("127.0.0.1"))


def written_pids(file: Path) -> list[int]:
    """Return the pids in the file, once they are there."""
    for _ in range(100):
        if file.exists() and len(found := file.read_text().split()) == 2:
            return [int(pid) for pid in found]
        time.sleep(0.1)
    raise AssertionError("the server did not start")


def all_end(pids: list[int], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.1)
    return False


def launcher(pids: Path) -> subprocess.Popen[bytes]:
    """Start a process that runs a server and waits."""
    code = (
        "import sys, time; from pathlib import Path; from tests.unit.serving.test_server_process import *\n"
        # A background process of a shell script ignores SIGINT, and so would this one.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with running_server(server(ServerWithoutModel, Path(sys.argv[1])), None, 60): print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(pids)], stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    return process


def test_no_process_is_left_after_use_and_other_children_live(tmp_path: Path):
    with subprocess.Popen(["sleep", "60"]) as other:
        with running_server(server(ServerWithoutModel, tmp_path / "pids"), None, 30) as guardian:
            pids = written_pids(tmp_path / "pids")
            assert set(pids) <= {process.pid for process in guardian.children(recursive=True)}
        assert all_end(pids, seconds=1)
        assert other.poll() is None
        other.kill()


def test_a_server_that_ends_is_reported_with_its_code(tmp_path: Path):
    message = "the server of transformers ended with code 7 before it answered"
    with pytest.raises(UserError, match=message), running_server(server(FailingServer, tmp_path), None, 30):
        pass


def test_a_server_that_never_answers_is_stopped_at_the_time_limit(tmp_path: Path):
    silent = server(SilentServer, tmp_path / "pids")
    with pytest.raises(UserError, match=r"did not answer at .* within 2 s"), running_server(silent, None, 2):
        pass
    assert all_end(written_pids(tmp_path / "pids"), seconds=1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_is_left_when_the_launcher_is_killed(tmp_path: Path, number: int):
    process = launcher(tmp_path / "pids")
    process.send_signal(number)
    assert all_end(written_pids(tmp_path / "pids"))
    process.wait()


def test_no_process_is_left_when_the_guardian_is_killed(tmp_path: Path):
    process = launcher(tmp_path / "pids")
    [guardian] = psutil.Process(process.pid).children()
    guardian.send_signal(signal.SIGKILL)
    pids = written_pids(tmp_path / "pids")
    assert all_end(pids[:1])  # the server; its worker is now the launcher's
    os.kill(process.pid, signal.SIGINT)
    assert all_end(pids)
    process.wait()
