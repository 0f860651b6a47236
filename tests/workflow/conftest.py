"""One finished tiny run, shared by the tests that ask what a change would run again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from chain import Chain, tiny_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A tiny run that went through the whole chain."""
    chain = Chain(tmp_path_factory.mktemp("finished"), tiny_config())
    chain.run()
    return chain
