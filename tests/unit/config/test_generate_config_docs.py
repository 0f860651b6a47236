"""Generated files are up to date."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.pipeline_run import REPOSITORY

GENERATORS = [["-m", "longhaul.config.generate_config_docs"], ["envs/generate.py"]]


@pytest.mark.parametrize("generator", GENERATORS, ids=lambda words: words[-1])
def test_generated_files_are_up_to_date(generator: list[str]):
    """If this test fails, run `make generate`."""
    done = subprocess.run(
        [sys.executable, *generator, "--check"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
