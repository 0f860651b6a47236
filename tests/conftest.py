"""What several test folders share: their helper modules, one finished tiny run, a server in the place of a tracker's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FOLDERS = (
    "workflow",
    "cluster",
    "golden",
    "unit",
    "unit/data",
    "unit/train",
    "unit/convert",
    "parity",
    "survival",
    "gpu",
)
sys.path[:0] = [str(HERE), *(str(HERE / name) for name in FOLDERS)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-faults", action="store_true", help="every cell of the fault matrix, not a dozen")
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


@pytest.fixture(scope="session")
def offload_ops() -> None:
    """DeepSpeed's ops for an offloaded optimizer, compiled before ranks with a time limit need them: it takes a minute."""
    from longhaul.ops import ops_folder

    names = ("cpu_adam", "pin_memory", "async_io")
    if not all((ops_folder(None) / name / f"{name}.so").exists() for name in names):
        build = f"from longhaul.environment.facts import build_ops; failed = build_ops({names}, None)['failed']"
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-c", f"{build}; assert not failed, failed"]
        subprocess.run(command, env=environment, check=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """A tiny run of two processes that went through the whole chain on this machine."""
    from chain import Chain, tiny_config

    chain = Chain(tmp_path_factory.mktemp("finished"), tiny_config())
    chain.run()
    return chain


@pytest.fixture
def serve():
    """Starts a tracker's server that answers as told, on this machine."""
    from tracker_server import Server

    servers: list[Server] = []

    def start(answer: Callable[[str, Any], tuple[int, Any]]) -> Server:
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
