"""A stage refuses altered shards and an altered start before it reads them; its remedy names what to delete."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.artifacts.atomic_files import file_sha256
from longhaul.artifacts.paths import RunPaths, WeightsFolder
from longhaul.errors import UserError
from longhaul.train.checkpoint.weights_folder import StartingCheckpoint
from longhaul.train.verified_inputs import verify_data, verify_start
from tests.support.small_run import DATASET, STAGE, STEP, write_small_run

ALONE: Any = SimpleNamespace(rank=SimpleNamespace(rank=0, world_size=1), gather=lambda value: [value])


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return write_small_run(tmp_path / "results")


def test_altered_shard_is_refused_with_the_files_to_delete(run: RunPaths):
    job: Any = SimpleNamespace(data=str(run.manifest(DATASET)))
    data = DataManifest.read(run.manifest(DATASET))
    verify_data(job, data, ALONE)
    shard = run.shards(DATASET) / "a" / "0.bin"
    shard.write_text("tokenz")
    with pytest.raises(UserError, match=f"dataset prose: {shard} does not have the SHA-256") as refused:
        verify_data(job, data, ALONE)
    assert f"rm -r {shard.parent} {run.manifest(DATASET)};" in refused.value.hint
    mixture: Any = [{"weight": 1, "manifest": dataclasses.asdict(data)}]
    mixed = dataclasses.replace(data, dataset="mixed", mixture=mixture)
    with pytest.raises(UserError, match="dataset mixed") as refused:
        verify_data(SimpleNamespace(data=str(run.manifest("mixed"))), mixed, ALONE)  # type: ignore[arg-type]
    assert f"rm -r {shard.parent} {run.manifest(DATASET)} {run.manifest('mixed')};" in refused.value.hint


def test_ranks_divide_the_files_and_all_learn_of_the_problem(run: RunPaths):
    data, job = DataManifest.read(run.manifest(DATASET)), SimpleNamespace(data=str(run.manifest(DATASET)))
    (run.shards(DATASET) / "a" / "0.bin").write_text("tokenz")
    for rank in range(2):
        read: list[list[str]] = []

        def gather(value: list[str], read: list[list[str]] = read) -> list[list[str]]:
            read.append(value)
            return [value, ["/other cannot be read"]]

        context: Any = SimpleNamespace(rank=SimpleNamespace(rank=rank, world_size=2), gather=gather)
        with pytest.raises(UserError):
            verify_data(job, data, context)  # type: ignore[arg-type]
        assert len(read[0]) == (rank == 0), "the only file belongs to rank 0"


def test_altered_start_is_refused(run: RunPaths):
    folder = WeightsFolder(run.stage(STAGE).path / "weights" / "0123").checkpoint(STEP)
    manifest = folder / "manifest.json"
    start = StartingCheckpoint(folder, file_sha256(manifest))
    verify_start(start, ALONE)
    weights = folder / "mp_rank_00_model_states.pt"
    weights.write_text("weightz")
    with pytest.raises(UserError, match=f"{weights} does not have the SHA-256"):
        verify_start(start, ALONE)
    fields = json.loads(manifest.read_text())
    fields["files"][weights.name]["sha256"] = file_sha256(weights)
    manifest.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"manifest\.json is missing or is not the one that"):
        verify_start(start, ALONE)
