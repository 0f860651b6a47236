"""`longhaul verify` has a row for every part of a run, names each altered file, and never ends in a traceback."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.artifacts.paths import RunPaths, WeightsFolder
from longhaul.checks.verify_stored_files import FolderIntegrity, verify_stored_files
from tests.support.finished_run_files import DATASET, STAGE, STEP, write_finished_run
from tests.support.tampered_files import tampered_texts


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return write_finished_run(tmp_path / "results")


def weights_of(run: RunPaths) -> WeightsFolder:
    return WeightsFolder(run.stage(STAGE).path / "weights" / "0123")


def verify(run: RunPaths) -> list[FolderIntegrity]:
    plan: Any = SimpleNamespace(
        paths=run,
        config=SimpleNamespace(datasets={DATASET: SimpleNamespace(mixture={})}),
        stages=[SimpleNamespace(name=STAGE)],
        lock=Lock.read(run.lock),
        weights_root=lambda stage: run.stage(stage).path / "weights",
    )
    return verify_stored_files(plan)


def test_every_part_of_an_untouched_run_is_intact(run: RunPaths):
    found = verify(run)
    assert [(row.name, row.files, row.damage) for row in found] == [
        ("tokenizer", 1, ""),
        ("streamed", 1, ""),
        (DATASET, 1, ""),
        (STAGE, 2, ""),  # checkpoint.json: a manifest and the model's config
        (STAGE, 1, ""),  # the checkpoint
        (STAGE, 1, ""),  # the packs
        (STAGE, 1, ""),  # the data of an evaluation task
        (STAGE, 1, ""),  # the export
    ]


FILES: dict[str, Callable[[RunPaths], Path]] = {
    "tokenizer": lambda run: run.tokenizers / "t" / "tokenizer.json",
    "model config": lambda run: weights_of(run).model_config,
    "shard": lambda run: run.shards(DATASET) / "a" / "0.bin",
    "weights": lambda run: weights_of(run).checkpoint(STEP) / "mp_rank_00_model_states.pt",
    "packs": lambda run: weights_of(run).samples / "pack-d-train-4-0.bin",
    "task data": lambda run: run.task_data(STAGE, "quiz").with_suffix("") / "0123" / "data.arrow",
    "streamed rows": lambda run: run.fetched / "streamed-0123.jsonl",
    "export": lambda run: run.export(STAGE) / "config.json",
}


@pytest.mark.parametrize("name", FILES)
def test_one_altered_bit_is_found(name: str, run: RunPaths):
    path = FILES[name](run)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    (damage,) = [row.damage for row in verify(run) if row.damage]
    assert damage.endswith(f"{path.name} does not have the hash of the manifest")
    path.unlink()
    (damage,) = [row.damage for row in verify(run) if row.damage]
    assert path.name in damage


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_the_place_of_a_file_is_found(name: str, run: RunPaths):
    """Reading it would never end. A pipe has no bytes, so the size of a checkpoint's file already differs."""
    path = FILES[name](run)
    path.unlink()
    os.mkfifo(path)
    (damage,) = [row.damage for row in verify(run) if row.damage]
    assert path.name in damage and ("is a pipe or a device, not a file" in damage or name == "weights")


def test_another_checkpoint_in_the_place_of_the_stated_one_is_found(run: RunPaths):
    """Its own manifest fits its files."""
    manifest = weights_of(run).checkpoint(STEP) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("1.5", "1.25"))
    (damage,) = [row.damage for row in verify(run) if row.damage]
    assert damage.endswith("manifest.json does not have the hash of the manifest")


def test_a_checkpoint_of_another_release_is_a_row_of_the_result(run: RunPaths):
    manifest = weights_of(run).checkpoint(STEP) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 2', '"schema_version": 3'))
    damages = [row.damage for row in verify(run) if row.damage]
    assert f"{manifest} has schema version 3, this release of longhaul reads version 2" in damages


ARTIFACTS: dict[str, Callable[[RunPaths], Path]] = {
    "tokenizer.json": lambda run: run.tokenizer,
    "data manifest": lambda run: run.manifest(DATASET),
    "checkpoint.json": lambda run: run.stage(STAGE).checkpoint,
    "manifest.json": lambda run: weights_of(run).checkpoint(STEP) / "manifest.json",
    "record of packs": lambda run: weights_of(run).samples / "pack-d-train-4-0.json",
    "lock of task data": lambda run: run.task_data(STAGE, "quiz"),
    "export manifest": lambda run: run.export_manifest(STAGE),
}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_tampered_artifacts_are_rows_of_the_result(name: str, run: RunPaths):
    path = ARTIFACTS[name](run)
    damaged = 0
    for change, text in tampered_texts(path.read_bytes()):
        path.write_bytes(text)
        try:
            damaged += any(row.damage for row in verify(run))
        except Exception as error:
            raise AssertionError(change) from error
    assert damaged
