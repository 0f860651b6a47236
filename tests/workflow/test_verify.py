"""`longhaul verify` finds all files of a finished run intact. Then it finds a damaged checkpoint, shard and export."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from longhaul.artifacts.artifact_schemas import DataManifest
from tests.support.pipeline_run import PipelineRun


def verify(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longhaul", "verify", "run.yaml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_verify_names_damaged_files(finished: PipelineRun, tmp_path: Path):
    intact = verify(finished.folder)
    assert intact.returncode == 0 and intact.stdout.endswith(" folders, 0 damaged\n"), intact.stdout + intact.stderr
    assert (
        intact.stdout.count("intact") >= 10
    )  # tokenizer, two datasets; of two stages: checkpoint.json, checkpoints, export

    folder = Path(shutil.copytree(finished.folder, tmp_path / "copy", symlinks=True))
    optimizer = sorted(folder.glob("results/tiny/stages/base/weights/*/checkpoints/step-*/zero_pp_rank_0*optim*"))[-1]
    data = bytearray(optimizer.read_bytes())
    data[-1000] ^= 1
    optimizer.write_bytes(data)
    (folder / "results/tiny/export/chat/latest/config.json").unlink()
    prose = DataManifest.read(
        folder / "results/tiny/data/prose.json"
    )  # the folder may also hold shards of earlier inputs
    shard = folder / prose.path / f"{prose.splits['train']['shards'][0]['prefix']}.bin"
    tokens = bytearray(shard.read_bytes())
    tokens[-1] ^= 1
    shard.write_bytes(tokens)
    (merges,) = folder.glob("results/tiny/tokenizers/*/tokenizer.json")
    merges.write_text(merges.read_text() + " ")
    damaged = verify(folder)
    assert damaged.returncode == 1 and damaged.stdout.endswith(" folders, 4 damaged\n"), damaged.stdout + damaged.stderr
    assert f"{optimizer.name} does not have the hash of the manifest" in damaged.stdout
    assert "tokenizer.json does not have the hash of the manifest" in damaged.stdout
    assert f"{shard.name} does not have the hash of the manifest" in damaged.stdout
    assert "config.json cannot be read: No such file or directory" in damaged.stdout
