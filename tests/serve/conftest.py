"""Python interpreters of the engines' environments, and the exports that they load."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.make_exports import CASES

PROMPTS = 50
ROOT = Path(__file__).parents[2]
# `make test-serve` makes these environments. The variables name other ones.
ENGINES = {
    "vllm": os.environ.get("LONGHAUL_TEST_VLLM", str(ROOT / ".venv-vllm/bin/python")),
    "transformers 4": os.environ.get("LONGHAUL_TEST_TRANSFORMERS_4", str(ROOT / ".venv-transformers-4/bin/python")),
    "transformers 5": sys.executable,
}


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each case's export."""
    folder = tmp_path_factory.mktemp("exports")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "tests.serve.make_exports", folder], check=True, env=environment, cwd=ROOT)
    return {name: folder / name / "export" / "main" / "latest" for name in CASES}


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with PROMPTS prompts of 24 token ids."""
    generator = random.Random(1)
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps([[generator.randrange(3, 259) for _ in range(24)] for _ in range(PROMPTS)]))
    return path


@pytest.fixture(scope="session")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A function that runs a script of this folder with an engine's interpreter and returns the JSON that it writes."""
    folder = tmp_path_factory.mktemp("scores")

    def run(engine: str, script: str, *arguments: str | Path) -> Any:
        out = folder / f"{len(list(folder.iterdir()))}.json"
        command = [ENGINES[engine], str(Path(__file__).with_name(script)), *map(str, arguments)]
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        found = subprocess.run(
            [part if part != "OUT" else str(out) for part in command],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
            env={**os.environ, **offline},
        )
        assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="session")
def reference(exports: dict[str, Path], prompts: Path, run_script: Callable[..., Any]) -> dict[str, Any]:
    """Values that the project's own release of transformers computes and reads for each case."""
    found = run_script("transformers 5", "score_with_transformers.py", prompts, "OUT", *exports.values())
    return {name: found[str(folder)] for name, folder in exports.items()}
