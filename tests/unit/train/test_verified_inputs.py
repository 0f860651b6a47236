"""A stage refuses altered shards and an altered start before it reads them; its remedy names what to delete."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.artifacts.atomic_files import file_blake3, file_sha256
from longhaul.artifacts.compare_hashes import FileHashes, wrong_files
from longhaul.artifacts.paths import RunPaths, WeightsFolder
from longhaul.errors import UserError
from longhaul.train import verified_inputs
from longhaul.train.checkpoint.weights_identity import StartingCheckpoint
from longhaul.train.verified_inputs import own_part, verify_data, verify_start
from tests.support.finished_run_files import DATASET, STAGE, STEP, write_finished_run

ALONE: Any = SimpleNamespace(
    rank=SimpleNamespace(rank=0, world_size=1),
    is_main=True,
    gather=lambda value: [value],
    broadcast=lambda value: value,
)


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return write_finished_run(tmp_path / "results")


@pytest.fixture
def weights(run: RunPaths) -> WeightsFolder:
    return WeightsFolder(run.stage(STAGE).path / "weights" / "0123")


def test_altered_shard_is_refused_with_the_files_to_delete(run: RunPaths, weights: WeightsFolder):
    job: Any = SimpleNamespace(data=str(run.manifest(DATASET)))
    data = DataManifest.read(run.manifest(DATASET))
    verify_data(job, data, weights, ALONE)
    shard = run.shards(DATASET) / "a" / "0.bin"
    shard.write_text("tokenz")
    with pytest.raises(UserError, match=f"dataset prose: {shard} does not have the hash") as refused:
        verify_data(job, data, weights, ALONE)
    assert f"rm -r {shard.parent} {run.manifest(DATASET)};" in refused.value.hint
    mixture: Any = [{"weight": 1, "manifest": dataclasses.asdict(data)}]
    mixed = dataclasses.replace(data, dataset="mixed", mixture=mixture)
    with pytest.raises(UserError, match="dataset mixed") as refused:
        verify_data(SimpleNamespace(data=str(run.manifest("mixed"))), mixed, weights, ALONE)  # type: ignore[arg-type]
    assert f"rm -r {shard.parent} {run.manifest(DATASET)} {run.manifest('mixed')};" in refused.value.hint


def test_later_attempts_hash_only_what_changed(
    run: RunPaths, weights: WeightsFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    job: Any = SimpleNamespace(data=str(run.manifest(DATASET)))
    data = DataManifest.read(run.manifest(DATASET))
    read: list[Path] = []

    def counted(files: FileHashes, file_hash: Callable[[Path], str]) -> Iterator[str]:
        read.extend(files)
        return wrong_files(files, file_hash)

    monkeypatch.setattr(verified_inputs, "wrong_files", counted)
    for _ in range(2):
        verify_data(job, data, weights, ALONE)
    shard = run.shards(DATASET) / "a" / "0.bin"
    assert read == [shard]
    times = shard.stat()
    shard.write_text("tokenz")  # of the same size
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="does not have the hash"):
        verify_data(job, data, weights, ALONE)
    with pytest.raises(UserError, match="does not have the hash"):  # what was refused is not recorded
        verify_data(job, data, weights, ALONE)
    shard.write_text("tokens")
    verify_data(job, data, weights, ALONE)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 8])
def test_ranks_divide_each_kind_of_file(ranks: int, tmp_path: Path):
    """Shards consist of a large and a small file. No rank gets more than its part of either, and no file is read twice."""
    files = {tmp_path / f"{number}.{suffix}": "0" * 64 for number in range(12) for suffix in ("bin", "idx", "mask")}
    parts = [
        [path for path, _ in own_part(files, SimpleNamespace(rank=SimpleNamespace(rank=rank, world_size=ranks)))]  # type: ignore[arg-type]
        for rank in range(ranks)
    ]
    assert sorted(path for part in parts for path in part) == sorted(files)
    for part in parts:
        for suffix in (".bin", ".idx", ".mask"):
            assert abs(sum(path.suffix == suffix for path in part) - 12 / ranks) < 1


def test_all_ranks_learn_of_the_problem(run: RunPaths, weights: WeightsFolder):
    data, job = DataManifest.read(run.manifest(DATASET)), SimpleNamespace(data=str(run.manifest(DATASET)))
    (run.shards(DATASET) / "a" / "0.bin").write_text("tokenz")
    found: list[list[str]] = []

    def gather(value: Any) -> list[Any]:
        if isinstance(value, int):
            return [value, 0]
        found.append(value)
        return [value, [*found[0]]]

    for rank in range(2):
        context = SimpleNamespace(rank=SimpleNamespace(rank=rank, world_size=2), is_main=rank == 0, gather=gather)
        context.broadcast = lambda value: value
        with pytest.raises(UserError):
            verify_data(job, data, weights, context)  # type: ignore[arg-type]
    assert [len(problems) for problems in found] == [1, 0], "the only file belongs to rank 0"


def test_altered_start_is_refused_until_it_is_restored(run: RunPaths):
    folder = WeightsFolder(run.stage(STAGE).path / "weights" / "0123").checkpoint(STEP)
    manifest = folder / "manifest.json"
    start = StartingCheckpoint(folder, file_sha256(manifest))
    verify_start(start, ALONE)
    weights = folder / "mp_rank_00_model_states.pt"
    trained = weights.read_text()
    weights.write_text("weightz")
    with pytest.raises(UserError, match=f"{weights} does not have the hash"):
        verify_start(start, ALONE)
    weights.write_text(trained)
    verify_start(start, ALONE)
    weights.write_text("weightz")
    fields = json.loads(manifest.read_text())
    fields["files"][weights.name]["blake3"] = file_blake3(weights)
    manifest.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"manifest\.json is missing or is not the one that"):
        verify_start(start, ALONE)
