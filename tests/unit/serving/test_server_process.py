"""A server leaves no process: after its use, after errors, and after kill -9 of any process above its workers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from longhaul.config.site_serving_config import Serving
from longhaul.errors import UserError
from longhaul.serving import server_process
from longhaul.serving.engines import Server, ServerShape
from longhaul.serving.link_server_nodes import NodeLink
from longhaul.serving.server_process import engine_variables, free_port, run_until_first_node_ends, running_server
from tests.support.wait import is_alive

SLOW_SERVER = Path(__file__).with_name("slow_server.py")


class ServerWithoutModel(Server):
    """Starts slow_server.py, which writes its own pid and its worker's to the file `model`."""

    def command(self, node_rank: int = 0, leader: tuple[str, int] | None = None) -> tuple[str, ...]:
        return (sys.executable, str(SLOW_SERVER), str(self.port), str(self.model))


class FailingServer(Server):
    def command(self, node_rank: int = 0, leader: tuple[str, int] | None = None) -> tuple[str, ...]:
        return (sys.executable, "-c", "import sys; sys.exit(7)")


class SilentServer(ServerWithoutModel):
    """Answers at another port than the one that is asked. Nobody asks before it has started."""

    @property
    def health_url(self) -> str:
        written_pids(self.model)
        return f"http://127.0.0.1:{free_port('127.0.0.1')}/health"


def server(kind: type[Server], pids: Path) -> Server:
    return kind(Serving(), pids, "m", "fp32", "127.0.0.1", free_port("127.0.0.1"))


def written_pids(file: Path) -> list[int]:
    """Return the pids in the file, once they are there."""
    for _ in range(600):
        if file.exists() and len(found := file.read_text().split()) == 2:
            return [int(pid) for pid in found]
        time.sleep(0.1)
    raise AssertionError("the server did not start")


def all_end(pids: list[int], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(map(is_alive, pids)):
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
    with (
        pytest.raises(UserError, match=message) as ended,
        running_server(server(FailingServer, tmp_path), None, 30),
    ):
        pass
    command = ended.value.hint.split("try it alone: ")[1]
    assert subprocess.run(command, shell=True, check=False).returncode == 7


def test_a_server_that_is_slow_is_reported_until_it_has_more_time(tmp_path: Path):
    slow = server(ServerWithoutModel, tmp_path / "pids")
    with pytest.raises(UserError, match="within 0 s") as refused, running_server(slow, None, 0):
        pass
    assert "increase start_timeout_s if it was still loading" in refused.value.hint
    with running_server(slow, None, 30):
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


def link_to(port: int) -> NodeLink:
    connection = socket.create_connection(("127.0.0.1", port))
    return NodeLink(1, "127.0.0.1", "127.0.0.1", 1, connection)


def other_node(pids: Path, port: int) -> subprocess.Popen[bytes]:
    """Start the process of a second node, whose first node listens at a port."""
    code = (
        "import sys; from pathlib import Path; from tests.unit.serving.test_server_process import *\n"
        "run_until_first_node_ends(server(ServerWithoutModel, Path(sys.argv[1])), link_to(int(sys.argv[2])))"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(pids), str(port)])


def test_another_nodes_part_ends_with_the_first_nodes_process_and_not_by_a_signal(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as first_node:
        process = other_node(tmp_path / "pids", first_node.getsockname()[1])
        pids = written_pids(tmp_path / "pids")
        process.send_signal(signal.SIGTERM)
        assert not all_end(pids, seconds=1), "the first node may still drain"
    assert all_end(pids)
    assert process.wait(timeout=60) == 0


def test_no_process_is_left_when_another_nodes_process_is_killed(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as first_node:
        process = other_node(tmp_path / "pids", first_node.getsockname()[1])
        pids = written_pids(tmp_path / "pids")
        process.kill()
        assert all_end(pids)
        process.wait()


def test_the_end_of_the_engine_on_another_node_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_process, "_OTHER_NODES_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as first_node, link_to(first_node.getsockname()[1]).connection as link:
        message = rf"the engine transformers ended with code 7 on {socket.gethostname()}"
        with pytest.raises(RuntimeError, match=message):
            run_until_first_node_ends(server(FailingServer, tmp_path), NodeLink(1, "127.0.0.1", "127.0.0.1", 1, link))


def test_the_variables_of_the_trainer_do_not_reach_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("OMP_NUM_THREADS", "96")
    one = Server(Serving(engine="vllm"), tmp_path, "m", "bf16", "127.0.0.1", 8000)
    assert engine_variables(one, "key-key-key-key-key", None)["VLLM_API_KEY"] == "key-key-key-key-key"
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "96", "one process uses all cores"
    spread = replace(one, shape=ServerShape(tensor=8))
    engine_variables(spread, None, None)
    assert "OMP_NUM_THREADS" not in os.environ


def test_an_engine_on_several_nodes_gets_the_address_of_its_node(tmp_path: Path):
    with socket.socket() as connection:
        link = NodeLink(1, "10.0.0.1", "10.0.0.2", 1, connection)
        several = Server(Serving(engine="vllm"), tmp_path, "m", "bf16", "10.0.0.2", 8000, ServerShape(nodes=2))
        found = engine_variables(several, None, link)
    assert (found["VLLM_HOST_IP"], found["SGLANG_HOST_IP"]) == ("10.0.0.2", "10.0.0.2")
