"""Conversion and proof of a model keep within 1 GiB and its largest layer, mapped pages counted."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from longhaul.artifacts.schemas import Export
from longhaul.config.run_config import Parallel
from tests.support.stage_folder import Stage, make_stage
from tests.support.synthetic_checkpoints import llama, mixture, write_checkpoint, write_proof, write_split_checkpoint
from tests.support.zero_training import write_manifest

LAYERS, HIDDEN, VOCABULARY = 24, 1024, 2000
MIXTURE_LAYERS, MIXTURE_HIDDEN, EXPERTS = 24, 768, 16
LIMIT_BYTES = 1 << 30
# ru_maxrss would be the largest of this process and of the one that started it.
CONVERT = """
import sys
from pathlib import Path
from longhaul.export import sample_text as generate
from longhaul.export import check_logits as logits
from longhaul.export.export_checkpoint import run
from longhaul.jobs.specs import ExportSpec
generate.NEW_TOKENS = logits.PERTURBATIONS = 1  # each more reads all weights once more, in the same way
run(ExportSpec.read(Path(sys.argv[1])))
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.fixture(scope="module")
def trained() -> Iterator[Path]:
    """A training's folder; removed at once, as pytest would keep gigabytes."""
    with tempfile.TemporaryDirectory() as name:
        config = llama(LAYERS, HIDDEN, VOCABULARY)
        folder = write_checkpoint(Path(name) / "weights", config, ranks=2, moments=False)
        write_proof(Path(name) / "weights", config)
        write_manifest(folder)
        yield Path(name)


@pytest.fixture
def trained_mixture() -> Iterator[Path]:
    """The same of a mixture of experts, split over two stages of a pipeline and, in each, its experts over two ranks."""
    with tempfile.TemporaryDirectory() as name:
        config = mixture(MIXTURE_LAYERS, MIXTURE_HIDDEN, EXPERTS, VOCABULARY)
        folder = write_split_checkpoint(Path(name) / "weights", config, Parallel(pipeline=2, expert=2), world_size=4)
        write_proof(Path(name) / "weights", config)
        write_manifest(folder)
        yield Path(name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peak_memory_is_bounded_by_the_largest_layer(trained: Path, dtype: str) -> None:
    layer_bytes = 4 * (HIDDEN * HIDDEN * 5 // 2 + 3 * HIDDEN * 4 * HIDDEN)
    _assert_bounded(trained, dtype, layer_bytes)


def test_peak_memory_is_bounded_where_experts_lie_on_several_ranks(trained_mixture: Path) -> None:
    attention, expert = 5 * MIXTURE_HIDDEN**2 // 2, 2 * MIXTURE_HIDDEN**2
    _assert_bounded(trained_mixture, "bf16", 4 * (attention + EXPERTS * (expert + MIXTURE_HIDDEN)))


def _assert_bounded(trained: Path, dtype: str, layer_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        stage = make_stage(trained, Path(name), dtype, copy=os.link)
        made, peak_bytes = _convert(stage)
    weights_bytes = 4 * made.parameters
    assert made.proof["logits"]["tokens"] == 34 and made.samples
    assert made.proof["logits"].get("masters_bit_equal", made.proof["logits"]["bit_equal"])
    assert weights_bytes > LIMIT_BYTES + 4 * layer_bytes, "a model that fits would prove nothing"
    assert peak_bytes <= LIMIT_BYTES + layer_bytes, f"{peak_bytes / 2**20:.0f} MiB"


def _convert(stage: Stage) -> tuple[Export, int]:
    path = stage.root / "job.json"
    stage.job.write(path)
    found = subprocess.run(
        [sys.executable, "-c", CONVERT, str(path)], check=False, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return Export.read(Path(stage.job.out)), int(found.stdout.split()[-2]) * 1024
