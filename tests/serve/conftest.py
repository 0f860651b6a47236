"""Python interpreters of the engines' environments, the exports that they load, and the record of what they compute."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import Export
from tests.serve.make_exports import CASES
from tests.serve.serve_record import ServeRecord

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
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The link to the export of the demo, which `longhaul run` trains in about 2.5 minutes.

    A server of it starts in another folder, so the paths in its manifest are made absolute.
    """
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "longhaul", "run", "demo", "results/demo/export/chat.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow")}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    latest = folder / "results/demo/export/chat/latest"
    export = Export.read(manifest_of(latest))
    absolute = {"path": str(folder / export.path), "checkpoint": str(folder / export.checkpoint)}
    replace(export, **absolute).write(manifest_of(latest))
    return latest


def manifest_of(latest: Path) -> Path:
    """Return the manifest of an export. latest: the link to its folder"""
    return latest.parents[1] / f"{latest.parent.name}.json"


@pytest.fixture(scope="session")
def record() -> Iterator[ServeRecord]:
    """The rows of bench/results/serve.txt."""
    record = ServeRecord()
    yield record
    packages = ("transformers", "torch")
    record.write(
        {
            "vllm": (ENGINES["vllm"], ("vllm", *packages)),
            "transformers 4": (ENGINES["transformers 4"], packages),
        }
    )


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
