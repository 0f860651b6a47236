"""A stage with a length in epochs counts its samples once, and later attempts read what was recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.artifacts.atomic_files import read_json
from longhaul.artifacts.paths import JobId, WeightsFolder
from longhaul.errors import InputError, UserError
from longhaul.jobs.job_kind import job_spec
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.train.checkpoint.weights_folder import claim_weights_folder
from longhaul.train.checkpoint.weights_identity import weights_identity
from longhaul.train.count_steps import with_counted_steps
from tests.support.corpora import conversation, dataset, make_shards, make_tokenizer, text, write_jsonl
from tests.support.small_configs import plan_of

ALONE: Any = SimpleNamespace(
    rank=SimpleNamespace(rank=0, world_size=1),
    is_main=True,
    gather=lambda value: [value],
    broadcast=lambda value: value,
    barrier=lambda: None,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataManifest, DataManifest]:
    """A dataset of texts and one of chats."""
    folder = tmp_path_factory.mktemp("shards")
    texts = write_jsonl(folder / "texts.jsonl", "text", (text(i) for i in range(40)))
    chats = write_jsonl(folder / "chats.jsonl", "messages", (conversation(i) for i in range(40)))
    make_tokenizer(folder, [texts])
    parts = [(folder / "t", texts, dataset()), (folder / "c", chats, dataset("chat"))]
    for part, _, _ in parts:
        part.mkdir()
    found = [make_shards(part, folder, [file], settings) for part, file, settings in parts]
    return found[0], found[1]


def stage_of(folder: Path, kind: str, epochs: float, **keys: Any) -> TrainSpec:
    number, name = (0, "base") if kind == "pretrain" else (1, "chat")
    changes = {f"stages.{number}.{key}": value for key, value in {"steps": ..., "epochs": epochs, **keys}.items()}
    job = job_spec(plan_of(folder / "plan", changes), JobId("train", (name,)))
    assert isinstance(job, TrainSpec)
    return job


def test_windows_of_the_train_split_are_counted(shards: tuple[DataManifest, DataManifest], tmp_path: Path):
    job = stage_of(tmp_path, "pretrain", 1.5)
    windows = -(-(shards[0].splits["train"]["tokens"] - 1) // 64)
    counted = with_counted_steps(job, shards[0], WeightsFolder(tmp_path / "w"), ALONE)
    assert counted.steps == -(-3 * windows // 16) > 1
    assert counted.model_copy(update={"planned_steps": None}) == job


def test_packs_are_counted(shards: tuple[DataManifest, DataManifest], tmp_path: Path):
    """The pack file is the one that the training maps."""
    job, weights = stage_of(tmp_path, "sft", 2, sequence_length=128), WeightsFolder(tmp_path / "w")
    counted = with_counted_steps(job, shards[1], weights, ALONE)
    (totals,) = [read_json(path) for path in weights.samples.glob("pack-*-train-*.json")]
    assert 1 < totals["packs"] < 40 and counted.steps == -(-2 * totals["packs"] // 8)


def test_later_attempts_read_the_record(shards: tuple[DataManifest, DataManifest], tmp_path: Path):
    """They need no shard. Other epochs are counted again."""
    data, weights = shards[0], WeightsFolder(tmp_path / "w")
    job = with_counted_steps(stage_of(tmp_path, "pretrain", 2), data, weights, ALONE)
    tokenizer: Any = SimpleNamespace(hash="0")
    identity = weights_identity(job, data, tokenizer, None)
    assert not {"steps", "epochs"} & identity["spec"].keys(), "a stage can be extended"
    claim_weights_folder(job, identity, weights.path, ALONE)
    recorded = read_json(weights.identity)
    assert (recorded["steps"], recorded["epochs"]) == (job.steps, 2.0)
    moved: Any = json.loads(json.dumps(data.__dict__)) | {"path": str(tmp_path / "gone")}
    gone = DataManifest.from_fields(moved)
    assert with_counted_steps(stage_of(tmp_path, "pretrain", 2), gone, weights, ALONE).steps == job.steps
    with pytest.raises(UserError, match="cannot be read"):
        with_counted_steps(stage_of(tmp_path, "pretrain", 3), gone, weights, ALONE)
    assert with_counted_steps(stage_of(tmp_path, "pretrain", 3), data, weights, ALONE).steps > job.steps


def test_other_epochs_of_a_decaying_schedule_train_again_only_on_request(tmp_path: Path):
    """With `restart: true` the epochs are part of the identity, as the steps are."""
    job = stage_of(tmp_path, "pretrain", 2, restart=True)
    data: Any = SimpleNamespace(hash="1")
    assert weights_identity(job, data, data, None)["spec"]["epochs"] == 2.0


def test_altered_shards_are_not_counted(shards: tuple[DataManifest, DataManifest], tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(shards[0].path, folder)
    shard = next(folder.rglob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    fields: Any = shards[0].__dict__ | {"path": str(folder)}
    with pytest.raises(UserError, match="does not have the hash"):
        with_counted_steps(
            stage_of(tmp_path, "pretrain", 1), DataManifest.from_fields(fields), WeightsFolder(tmp_path / "w"), ALONE
        )


def test_a_schedule_longer_than_the_epochs_is_refused(shards: tuple[DataManifest, DataManifest], tmp_path: Path):
    job = stage_of(tmp_path, "pretrain", 0.001, schedule={"warmup_steps": 2})
    with pytest.raises(
        InputError, match=r"warmup_steps 2 \+ decay_steps 0 exceed the stage's 1 steps, which are 0.001 epochs"
    ):
        with_counted_steps(job, shards[0], WeightsFolder(tmp_path / "w"), ALONE)
    job = stage_of(tmp_path, "pretrain", 1e6, global_batch_size=1)
    huge = job.model_copy(update={"stage": job.stage.model_copy(update={"epochs": 1e12})})
    with pytest.raises(InputError, match=r"stages.base.epochs 1000000000000.0 are \d+ steps; a stage has at most"):
        with_counted_steps(huge, shards[0], WeightsFolder(tmp_path / "w2"), ALONE)


def test_epochs_of_an_empty_split_are_refused_until_it_has_documents(
    shards: tuple[DataManifest, DataManifest], tmp_path: Path
):
    empty: Any = {"train": {"shards": [], "tokens": 0, "documents": 0, "loss_tokens": 0}}
    data = DataManifest.from_fields(shards[0].__dict__ | {"splits": empty})
    with pytest.raises(InputError, match=r"stage base: the train split of dataset .* has no documents"):
        with_counted_steps(stage_of(tmp_path, "pretrain", 1), data, WeightsFolder(tmp_path / "w"), ALONE)
    assert with_counted_steps(stage_of(tmp_path, "pretrain", 1), shards[0], WeightsFolder(tmp_path / "w"), ALONE)
