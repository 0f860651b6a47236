"""The export of a model and its verification need at most 1 GiB and the size of the largest layer, mapped pages included."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from longhaul.artifacts.artifact_schemas import Export
from longhaul.config.stage_config import Parallel
from tests.support.stage_folder import ExportableStage, create_exportable_stage
from tests.support.synthetic_checkpoints import (
    llama_config,
    mixture_config,
    write_checkpoint,
    write_reference_values,
    write_sliced_checkpoint,
)
from tests.support.train_zero_checkpoints import write_manifest

LAYERS, HIDDEN, VOCABULARY = 24, 1024, 2000
MIXTURE_LAYERS, MIXTURE_HIDDEN, EXPERTS = 24, 768, 16
LIMIT_BYTES = 1 << 30
# VmHWM, as ru_maxrss would be the maximum of this process and of the one that started it.
EXPORT = """
import sys
from pathlib import Path
from longhaul.export import generate_samples, verify_logits
from longhaul.export.export_checkpoint import run
from longhaul.jobs.kinds.export_job import ExportSpec
# Each further token or perturbation reads all weights once more, in the same way.
generate_samples.NEW_TOKENS = verify_logits.PERTURBATIONS = 1
run(ExportSpec.read(Path(sys.argv[1])))
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.fixture(scope="module")
def trained() -> Iterator[Path]:
    """Return a training's folder. It is removed after the module, as pytest would keep gigabytes."""
    with tempfile.TemporaryDirectory() as name:
        config = llama_config(LAYERS, HIDDEN, VOCABULARY)
        folder = write_checkpoint(Path(name) / "weights", config, ranks=2, moments=False)
        write_reference_values(Path(name) / "weights", config)
        write_manifest(folder)
        yield Path(name)


@pytest.fixture
def trained_mixture() -> Iterator[Path]:
    """Return the same for a mixture of experts with two pipeline ranks, whose experts are split over two ranks each."""
    with tempfile.TemporaryDirectory() as name:
        config = mixture_config(MIXTURE_LAYERS, MIXTURE_HIDDEN, EXPERTS, VOCABULARY)
        folder = write_sliced_checkpoint(Path(name) / "weights", config, Parallel(pipeline=2, expert=2), world_size=4)
        write_reference_values(Path(name) / "weights", config)
        write_manifest(folder)
        yield Path(name)


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_peak_memory_is_bounded_by_the_largest_layer(trained: Path, dtype: str) -> None:
    layer_bytes = 4 * (HIDDEN * HIDDEN * 5 // 2 + 3 * HIDDEN * 4 * HIDDEN)
    _assert_bounded(trained, dtype, layer_bytes)


@pytest.mark.slow
def test_peak_memory_is_bounded_where_experts_lie_on_several_ranks(trained_mixture: Path) -> None:
    attention, expert = 5 * MIXTURE_HIDDEN**2 // 2, 2 * MIXTURE_HIDDEN**2
    _assert_bounded(trained_mixture, "bf16", 4 * (attention + EXPERTS * (expert + MIXTURE_HIDDEN)))


def _assert_bounded(trained: Path, dtype: str, layer_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        stage = create_exportable_stage(trained, Path(name), dtype, copy=os.link)
        exported, peak_bytes = _export(stage)
    weights_bytes, logits = 4 * exported.parameters, exported.verification["logits"]
    assert logits["tokens"] == 34 and exported.samples
    assert logits.get("masters_bit_equal", logits["bit_equal"])
    assert weights_bytes > LIMIT_BYTES + 4 * layer_bytes, "the model must be larger than the limit"
    assert peak_bytes <= LIMIT_BYTES + layer_bytes, f"{peak_bytes / 2**20:.0f} MiB"


def _export(stage: ExportableStage) -> tuple[Export, int]:
    path = stage.root / "job.json"
    stage.job.write(path)
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(path)], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Export.read(Path(stage.job.out)), int(done.stdout.split()[-2]) * 1024
