"""`longhaul verify` of a finished run: all is whole; then bits of a checkpoint and a shard are lost, and a file of an export."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from longhaul.artifacts.schemas import DataManifest
from tests.support.chain import Chain


def verify(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longhaul", "verify", "run.yaml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_verify_names_what_is_damaged(finished: Chain, tmp_path: Path):
    whole = verify(finished.folder)
    assert whole.returncode == 0 and whole.stdout.endswith(" folders, 0 damaged\n"), whole.stdout + whole.stderr
    assert whole.stdout.count("whole") >= 7  # two datasets, checkpoints of two stages and an export of each

    folder = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    optimizer = sorted(folder.glob("results/tiny/stages/base/weights/*/checkpoints/step-*/zero_pp_rank_0*optim*"))[-1]
    data = bytearray(optimizer.read_bytes())
    data[-1000] ^= 1
    optimizer.write_bytes(data)
    (folder / "results/tiny/export/chat/config.json").unlink()
    prose = DataManifest.read(folder / "results/tiny/data/prose.json")  # shards of earlier files may lie beside its own
    shard = folder / prose.path / f"{prose.splits['train']['shards'][0]['prefix']}.bin"
    tokens = bytearray(shard.read_bytes())
    tokens[-1] ^= 1
    shard.write_bytes(tokens)
    damaged = verify(folder)
    assert damaged.returncode == 1 and damaged.stdout.endswith(" folders, 3 damaged\n"), damaged.stdout + damaged.stderr
    assert f"{optimizer.name} has not the hash that its manifest states" in damaged.stdout
    assert f"{shard.name} has not the hash that was stated" in damaged.stdout
    assert "config.json cannot be read: No such file or directory" in damaged.stdout
