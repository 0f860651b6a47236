"""Fixtures of several unit tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TRAINING = Path(__file__).parents[1] / "support" / "train_zero_checkpoints.py"


@pytest.fixture(autouse=True, scope="module")
def no_rank_of_another_module(monkeypatch_module: pytest.MonkeyPatch) -> None:
    """Take away what DeepSpeed sets in a process that trains: accelerate would wait for other ranks."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch_module.delenv(name, raising=False)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size in bytes of each read of a tensor's file so far. A test may clear the list."""
    sizes: list[int] = []
    original = os.preadv

    def counted(*arguments):
        sizes.append(original(*arguments))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", counted)
    return sizes


@pytest.fixture(scope="session")
def zero_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the checkpoints of train_zero_checkpoints.py: every case, trained by real DeepSpeed over gloo."""
    folder = tmp_path_factory.mktemp("zero_checkpoints")
    for world_size in (1, 2):
        _train(folder, world_size)
    return folder


def _train(folder: Path, world_size: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(sys.path)
    shared = {
        "PYTHONPATH": paths,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    processes, logs = [], []
    for rank in range(world_size):
        logs.append(folder / f"rank-{rank}-of-{world_size}.log")
        own = {"RANK": rank, "LOCAL_RANK": rank, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": folder / "ops"}
        environment = {**os.environ, **{key: str(value) for key, value in {**shared, **own}.items()}}
        with logs[-1].open("w") as log:
            command = [sys.executable, str(TRAINING), str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait(timeout=300) for process in processes]
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
