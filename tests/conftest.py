"""What several test folders share: their helper modules, one finished tiny run, a server in the place of a tracker's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest

OPS_BUILD = pytest.StashKey[subprocess.Popen[bytes]]()
# A session has a share of the machine of its own where the kernel groups processes so, and a niceness for it.
BUILD_OPS = """
import os
from contextlib import suppress
from pathlib import Path
from longhaul.checks.node_facts import build_ops
os.nice(19)
with suppress(OSError):
    Path("/proc/self/autogroup").write_text("19")
failed = build_ops(("cpu_adam", "pin_memory", "async_io"), None)["failed"]
assert not failed, failed
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-faults", action="store_true", help="every cell of the fault matrix, not a dozen")
    parser.addoption("--all-layouts", action="store_true", help="every layout on the cluster, not each axis once")
    parser.addoption(
        "--all-moves", action="store_true", help="every move from one layout to another, not one of a kind"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "all_faults: a fault that make faults tests, and make test leaves out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all-faults"):
        left_out = [item for item in items if item.get_closest_marker("all_faults")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compiles ops where a test will ask for them: minutes of two cores, of which the tests on the cluster leave as much."""
    wanted = any("offload_ops" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "MAX_JOBS": "2"}  # each takes 2 GB
        session.config.stash[OPS_BUILD] = subprocess.Popen(
            [sys.executable, "-c", BUILD_OPS], env=environment, start_new_session=True, stdout=subprocess.DEVNULL
        )


def pytest_unconfigure(config: pytest.Config) -> None:
    build = config.stash.get(OPS_BUILD, None)
    if build and build.poll() is None:
        os.killpg(build.pid, signal.SIGTERM)  # at which ninja ends its compilers


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Waits for the ops around pytest-timeout, which would count that to the time of the first test that needs them."""
    if "offload_ops" in getattr(item, "fixturenames", ()):
        item.config.stash[OPS_BUILD].wait(timeout=3600)
    return (yield)


@pytest.fixture(scope="session")
def offload_ops(pytestconfig: pytest.Config) -> None:
    """DeepSpeed's ops for an offloaded optimizer, compiled before ranks with a time limit need them."""
    assert pytestconfig.stash[OPS_BUILD].returncode == 0, "DeepSpeed's ops were not compiled"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """A tiny run of two processes that went through the whole chain on this machine."""
    from tests.support.chain import Chain, tiny_config

    chain = Chain(tmp_path_factory.mktemp("finished"), tiny_config())
    chain.run()
    return chain


@pytest.fixture
def serve():
    """Starts a tracker's server that answers as told, on this machine."""
    from tests.support.tracker_server import Server

    servers: list[Server] = []

    def start(answer: Callable[[str, Any], tuple[int, Any]]) -> Server:
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
