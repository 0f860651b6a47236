"""What several test folders share: their helper modules, and one finished tiny run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FOLDERS = ("workflow", "cluster", "golden", "unit/data", "parity", "survival")
sys.path[:0] = [str(HERE), *(str(HERE / name) for name in FOLDERS)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-faults", action="store_true", help="every cell of the fault matrix, not a dozen")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """A tiny run of two processes that went through the whole chain on this machine."""
    from chain import Chain, tiny_config

    chain = Chain(tmp_path_factory.mktemp("finished"), tiny_config())
    chain.run()
    return chain
