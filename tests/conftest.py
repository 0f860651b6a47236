"""What several test folders share: their helper modules, and one finished tiny run."""

from __future__ import annotations

import sys
from pathlib import Path

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


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "all_faults: a fault that make faults tests, and make test leaves out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all-faults"):
        left_out = [item for item in items if item.get_closest_marker("all_faults")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """A tiny run of two processes that went through the whole chain on this machine."""
    from chain import Chain, tiny_config

    chain = Chain(tmp_path_factory.mktemp("finished"), tiny_config())
    chain.run()
    return chain
