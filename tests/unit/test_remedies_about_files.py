"""Every remedy that tells to delete, move or restore something is followed: afterwards the same action works.

REMEDIES is the table; test_every_remedy_is_followed.py compares it with the source.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import DataManifest, TokenizerManifest
from longhaul.artifacts.atomic_files import write_json
from longhaul.artifacts.compare_hashes import read_tokenizer
from longhaul.artifacts.leases import Lease
from longhaul.artifacts.paths import JobId, WeightsFolder
from longhaul.artifacts.quarantine import read_quarantine
from longhaul.data.sampling import mixture_manifest
from longhaul.data.sampling.samples import Samples
from longhaul.data.shards import tokenize_dataset
from longhaul.data.shards.source_index import IndexedSources
from longhaul.data.shards.write_chunk import RECORD
from longhaul.errors import UserError
from longhaul.jobs.job_spec import LaunchSpec
from longhaul.jobs.launch_files import write_launch_files
from longhaul.train.checkpoint.load_checkpoint import check_belongs_to
from longhaul.train.verified_inputs import verify_data, verify_packs
from tests.support.checkpoint_manifest import manifest_fields
from tests.support.corpora import conversation, dataset, make_tokenizer, text, tokenize_job, write_jsonl
from tests.support.small_configs import plan_of

ALONE: Any = SimpleNamespace(
    rank=SimpleNamespace(rank=0, world_size=1),
    is_main=True,
    gather=lambda value: [value],
    broadcast=lambda value: value,
)


class Place:
    """A folder with a tokenizer, a dataset of chats and the launch files of a small run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.corpus = write_jsonl(folder / "texts.jsonl", "text", (text(i) for i in range(40)))
        rows = [conversation(i % 40) for i in range(45)]  # five duplicates
        self.chats = write_jsonl(folder / "chats.jsonl", "messages", rows)
        self.make_tokenizer()
        job = tokenize_job(folder, folder, [self.chats], dataset("chat", validation_fraction=0.2, deduplicate="exact"))
        self.job = job.model_copy(update={"name": "data", "out": str(folder / "data.json")})
        self.tokenize()

    def make_tokenizer(self) -> None:
        make_tokenizer(self.folder, [self.corpus])

    def tokenize(self) -> None:
        tokenize_dataset.run(self.job)

    @property
    def manifest(self) -> DataManifest:
        return DataManifest.read(self.folder / "data.json")

    def chunk(self) -> Path:
        return next(path.parent for path in sorted(self.data.glob(f"*/{RECORD}")))

    def shard(self, ending: str) -> Path:
        return next(self.chunk().glob(f"train*.{ending}"))

    def samples(self) -> Samples:
        return Samples.open(self.manifest, "train", "sft", 64, 0, self.folder / "samples")

    def verify(self) -> None:
        verify_data(
            SimpleNamespace(data=str(self.folder / "data.json")), self.manifest, WeightsFolder(self.folder), ALONE
        )  # type: ignore[arg-type]

    def plan(self) -> Any:
        return plan_of(self.folder)

    def launch_spec(self) -> Path:
        return self.folder / self.plan().paths.job(JobId("environment", ())).launch_spec

    def mix(self) -> None:
        """Write the manifest of a mixture of the dataset with itself."""
        parts = {"one": str(self.folder / "data.json")}
        mixture = dataset("chat", files=(), mixture={"one": 1.0})
        out = str(self.folder / "mixed.json")
        mixture_manifest.run(self.job.model_copy(update={"dataset": mixture, "parts": parts, "out": out}))

    def mixed_samples(self) -> Samples:
        return Samples.open(
            DataManifest.read(self.folder / "mixed.json"), "train", "sft", 64, 0, self.folder / "samples"
        )


def delete_named(place: Place, error: UserError) -> None:
    """Delete what the remedy names, else what the message begins with; the manifest, where the remedy asks for that."""
    named = re.findall(r"(?<!\S)/[^\s;,:]+", error.hint) or re.findall(r"/[^\s;,:]+", error.message)[:1]
    assert named
    for path in map(Path, named):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if "data/data.json" in error.hint:
        (place.folder / "data.json").unlink()


def delete_manifest(name: str) -> Callable[[Place, UserError], None]:
    return lambda place, _error: (place.folder / name).unlink()


def run_command(_place: Place, error: UserError) -> None:
    """Run the command that the remedy states."""
    found = re.search(r"rm (-r )?/[^;]*", error.hint)
    assert found
    subprocess.run(found[0], shell=True, check=True)


def nothing(_place: Place) -> None:
    pass


@dataclass(frozen=True)
class Remedy:
    """One remedy. After `follow` and `again`, which stands for the next run, `use` works.

    says:   a part of the remedy's text, as in the source
    damage: makes `use` fail
    """

    says: str
    damage: Callable[[Place], Any]
    use: Callable[[Place], Any]
    follow: Callable[[Place, UserError], None] = delete_named
    again: Callable[[Place], Any] = nothing


def truncate(path: Path, size: int = 1) -> None:
    with path.open("r+b") as stream:
        stream.truncate(size)


def replace_record_by_a_foreign_file(place: Place) -> None:
    (place.chunk() / RECORD).unlink()
    (place.folder / "data.json").unlink()


def damage_record(place: Place) -> None:
    (place.chunk() / RECORD).write_text("{")
    (place.folder / "data.json").unlink()


def open_packs_and_damage(name: str, content: bytes) -> Callable[[Place], None]:
    def damage(place: Place) -> None:
        place.samples()
        (path,) = place.folder.glob(f"samples/{name}")
        path.write_bytes(content)

    return damage


def alter_packs(place: Place) -> None:
    """Exchange two conversations: the file stays valid."""
    place.samples()
    (path,) = place.folder.glob("samples/pack-*.bin")
    data = path.read_bytes()
    path.write_bytes(data[4:8] + data[:4] + data[8:])


def write_launch(place: Place) -> None:
    write_launch_files(place.plan(), place.folder)


def break_launch_spec(place: Place) -> None:
    write_launch(place)
    place.launch_spec().write_text("{")


def read_sources(place: Place) -> None:
    """Read the index as a job that shares the dataset does; the main process runs the rule of the index if it is missing."""
    path = place.folder / "data.sources.json"
    tokenizer = TokenizerManifest.read(place.folder / "tokenizer.json")
    if path.exists():
        IndexedSources.load(place.job, tokenizer, path)


def write_other_sources(place: Place) -> None:
    (place.folder / "data.sources.json").write_text(
        '{"artifact": "SourceIndex", "schema_version": 1, "tokenizer_hash": "other", "sources": [], "encoder": {}}'
    )


def take_lease(place: Place) -> None:
    lease = Lease(place.folder / "run.lease")
    if not lease.try_acquire():
        raise UserError(f"{lease.path} is unreadable", f"if no other snakemake works on this run: rm {lease.path}")
    lease.release()


def damage_mixture(place: Place) -> None:
    place.mix()
    path = place.folder / "mixed.json"
    path.write_text(
        path.read_text().replace('"tokenizer_hash"', '"other"', 2).replace('"other"', '"tokenizer_hash"', 1)
    )


def checkpoint_of_other_weights(place: Place) -> Path:
    folder = place.folder / "weights/this/checkpoints/step-00000001"
    write_json(folder / "manifest.json", manifest_fields({}, weights="other"))
    return folder


def check_weights(place: Place) -> None:
    for folder in place.folder.glob("weights/*/checkpoints/*"):
        check_belongs_to(folder.parents[1], folder)


def move_back(place: Place, error: UserError) -> None:
    (target,) = re.findall(r"…/(\w+)/checkpoints", error.hint)
    (place.folder / "weights/this").rename(place.folder / "weights" / target)


def edit_quarantine(place: Place) -> None:
    (place.folder / "quarantine.json").write_text("[]")


REMEDIES: dict[str, Remedy] = {
    "lost shard": Remedy(
        "and the dataset's manifest, data/",
        lambda place: place.shard("bin").unlink(),
        lambda place: [place.samples()[index] for index in range(len(place.samples()))],
        again=Place.tokenize,
    ),
    "altered shard": Remedy(
        "restore the file, or make it again: rm -r ",
        lambda place: place.shard("bin").write_bytes(bytes(place.shard("bin").stat().st_size)),
        Place.verify,
        run_command,
        Place.tokenize,
    ),
    "altered tokenizer": Remedy(
        "restore the file, or make the tokenizer again: rm ",
        lambda place: next(place.folder.glob("tokenizers/*/tokenizer.json")).write_text("{}"),
        lambda place: read_tokenizer(place.folder / "tokenizer.json"),
        run_command,
        Place.make_tokenizer,
    ),
    "artifact that is no JSON": Remedy(
        "delete it; the next run writes it again",
        lambda place: (place.folder / "tokenizer.json").write_text("{"),
        lambda place: read_tokenizer(place.folder / "tokenizer.json"),
        again=Place.make_tokenizer,
    ),
    "artifact of another release": Remedy(
        "another release wrote it: ",
        lambda place: (place.folder / "tokenizer.json").write_text('{"artifact": "Tokenizer", "schema_version": 0}'),
        lambda place: read_tokenizer(place.folder / "tokenizer.json"),
        again=Place.make_tokenizer,
    ),
    "record of a chunk": Remedy("delete the folder {folder} and run again", damage_record, Place.tokenize),
    "foreign folder": Remedy("move or delete it, then run again", replace_record_by_a_foreign_file, Place.tokenize),
    "totals of packs": Remedy("; both are written again", open_packs_and_damage("pack-*.json", b"{"), Place.samples),
    "table of filtered documents": Remedy(
        "delete the dataset's manifest and run again",
        lambda place: (place.data / place.manifest.splits["train"].get("filtered_out", "")).write_bytes(b"?"),
        Place.samples,
        delete_manifest("data.json"),
        Place.tokenize,
    ),
    "part of a mixture": Remedy(
        "delete the mixture's manifest; the next run writes it again",
        damage_mixture,
        Place.mixed_samples,
        delete_manifest("mixed.json"),
        Place.mix,
    ),
    "checkpoint of other weights": Remedy("move it back to …/", checkpoint_of_other_weights, check_weights, move_back),
    "altered packs": Remedy(
        "; both are written again",
        alter_packs,
        lambda place: verify_packs(place.folder / "samples", ALONE),
        again=Place.samples,
    ),
    "packs": Remedy("delete it and run again", open_packs_and_damage("pack-*.bin", b"\0" * 8), Place.samples),
    "job spec": Remedy(
        "delete it and run again",
        break_launch_spec,
        lambda place: LaunchSpec.read(place.launch_spec()),
        again=write_launch,
    ),
    "index of other sources": Remedy("delete it and run again", write_other_sources, read_sources),
    "unreadable lease": Remedy(
        "if no other snakemake works on this run: rm ",
        lambda place: (place.folder / "run.lease").write_text("?"),
        take_lease,
        run_command,
    ),
    "quarantine": Remedy(
        "correct the entry, or remove it",
        edit_quarantine,
        lambda place: read_quarantine(place.folder / "quarantine.json"),
    ),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def place(prepared: Place, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The place, as it was before the damage of the last test."""
    backup = prepared.folder.with_name("backup")
    shutil.copytree(prepared.folder, backup)
    monkeypatch.chdir(prepared.folder)
    yield prepared
    shutil.rmtree(prepared.folder)
    backup.rename(prepared.folder)


@pytest.mark.parametrize("name", REMEDIES)
def test_after_the_remedy_the_same_action_works(name: str, place: Place):
    remedy = REMEDIES[name]
    remedy.damage(place)
    with pytest.raises(UserError) as failed:
        remedy.use(place)
    said = re.sub(r"\{\w+\}", "", remedy.says)
    assert all(part in failed.value.hint for part in remedy.says.split("{folder}")), said
    remedy.follow(place, failed.value)
    remedy.again(place)
    remedy.use(place)
