"""Files are compared with their recorded hashes before use: tokenizer, shards, and the datasets of a mixture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import DataManifest, TokenizerManifest
from longhaul.artifacts.atomic_files import file_blake3, file_sha256, write_json, write_text
from longhaul.artifacts.compare_hashes import dataset_files, read_tokenizer, wrong_files
from longhaul.errors import UserError


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Return the path of a tokenizer's manifest; its folder has two files."""
    folder = tmp_path / "tokenizers" / "t"
    for name in ("tokenizer.json", "chat_template.jinja"):
        write_text(folder / name, name)
    files = {path.name: file_sha256(path) for path in folder.iterdir()}
    TokenizerManifest(str(folder), "t", 9, None, 1, 2, True, files).write(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_an_altered_tokenizer_is_not_used(tokenizer: Path, name: str):
    manifest = read_tokenizer(tokenizer)
    flip(Path(manifest.path) / name)
    with pytest.raises(UserError, match=f"{name} does not have the hash that was recorded") as refused:
        read_tokenizer(tokenizer)
    assert f"rm {tokenizer}" in refused.value.hint
    (Path(manifest.path) / name).unlink()
    with pytest.raises(UserError, match=f"{name} cannot be read: No such file"):
        read_tokenizer(tokenizer)


def test_a_device_in_the_place_of_a_file_is_not_read(tokenizer: Path):
    path = Path(read_tokenizer(tokenizer).path) / "tokenizer.json"
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"tokenizer\.json is a pipe or a device, not a file"):
        read_tokenizer(tokenizer)


def manifest_of(folder: Path, name: str) -> DataManifest:
    """Write a dataset of one shard and a table of filtered documents; return its manifest."""
    for file in ("c/0.bin", "c/0.idx", "filtered.npy"):
        write_text(folder / file, f"{name} {file}")
    shard = {ending: file_sha256(folder / f"c/0.{ending}") for ending in ("bin", "idx")}
    split: Any = {
        "shards": [{"prefix": "c/0", "tokens": 3, "documents": 1, "sha256": shard}],
        "tokens": 3,
        "documents": 1,
        "loss_tokens": 3,
        "filtered_out": "filtered.npy",
        "filtered_out_sha256": file_sha256(folder / "filtered.npy"),
    }
    return DataManifest(name, "text", str(folder), "d", "t", "uint16", {"train": split}, [], {}, 1.0)


def test_every_file_of_a_mixture_is_compared(tmp_path: Path):
    parts = [manifest_of(tmp_path / name, name) for name in ("a", "b")]
    mixture: Any = [{"weight": 1, "manifest": dataclasses.asdict(part)} for part in parts]
    mixed = dataclasses.replace(parts[0], mixture=mixture)
    files = dataset_files(mixed)
    assert len(files) == 6 and list(wrong_files(files)) == []
    for path in files:
        kept = path.read_bytes()
        flip(path)
        assert list(wrong_files(files)) == [f"{path} does not have the hash that was recorded when it was written"]
        path.write_bytes(kept)


def test_a_table_of_filtered_documents_without_a_hash_is_not_trusted(tmp_path: Path):
    manifest = manifest_of(tmp_path, "a")
    del manifest.splits["train"]["filtered_out_sha256"]  # type: ignore[misc]
    assert len(list(wrong_files(dataset_files(manifest)))) == 1


def test_manifest_without_files_is_refused(tmp_path: Path):
    fields = {"path": "p", "hash": "t", "vocab_size": 9, "bos_id": None, "eos_id": 1, "pad_id": 2}
    header = {"artifact": "TokenizerManifest", "schema_version": 1}
    write_json(tmp_path / "t.json", {**header, **fields, "has_chat_template": True})
    with pytest.raises(UserError, match="`files` is missing"):
        read_tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("file_hash", "of_abc"),
    [
        (file_sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (file_blake3, "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"),
    ],
)
def test_hashes_are_those_of_the_standard_programs(tmp_path: Path, file_hash: Callable[[Path], str], of_abc: str):
    path = tmp_path / "file"
    path.write_text("abc")
    assert list(wrong_files({path: of_abc}, file_hash)) == []
    path.write_text("abd")
    assert list(wrong_files({path: of_abc}, file_hash)) == [
        f"{path} does not have the hash that was recorded when it was written"
    ]
