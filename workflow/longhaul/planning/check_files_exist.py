"""Checks that all files a config names exist and are usable: data, tokenizer, pretrained config.json and weights, storage
folders.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.config.field_types import HuggingFaceConfig
from longhaul.config.generation_keys import check_generation_keys
from longhaul.config.load_config import LoadedConfig
from longhaul.config.pretrained_format import fp8_block_shape, pretrained_changes, trained_config
from longhaul.config.pretrained_keys import check_pretrained_keys
from longhaul.config.run_config import Storage
from longhaul.errors import UserError
from longhaul.planning.find_data_files import FoundFiles, check_format, find_files

_WEIGHTS = "*.safetensors"  # files in pickle format are not read


def model_config(loaded: LoadedConfig, lock: Lock | None) -> HuggingFaceConfig | None:
    """Return the trained model's Hugging Face config; None for a Hub model that is not fetched yet.

    Raises:
        UserError: the pretrained weights are missing, or training cannot start from their format or keys.
    """
    if loaded.config.model.pretrained is None:
        return loaded.config.model.config_dict()
    pretrained = _pretrained_config(loaded, lock)
    if pretrained is None:
        return None
    fp8_block_shape(pretrained, "model.pretrained")
    return trained_config(check_pretrained_keys(pretrained))


def changes_of_pretrained_weights(loaded: LoadedConfig, lock: Lock | None) -> tuple[str, ...]:
    """Return sentences about the changes between the pretrained folder's weights and the start weights."""
    pretrained = _pretrained_config(loaded, lock) if loaded.config.model.pretrained else None
    return pretrained_changes(pretrained) if pretrained else ()


def _pretrained_config(loaded: LoadedConfig, lock: Lock | None) -> HuggingFaceConfig | None:
    """Return the config.json of the pretrained model; None if it is not fetched yet."""
    pretrained = loaded.config.model.pretrained
    if pretrained is None or pretrained.hub:
        return lock.model if lock and lock.model else None
    return read_model_folder(loaded.resolve("model.pretrained.path", pretrained.path or ""), "model.pretrained.path")


def read_model_folder(folder: Path, key: str) -> HuggingFaceConfig:
    """Return the config.json of a Hugging Face folder that has all its files of weights (check_pretrained_weights reads them).

    Raises:
        UserError: config.json or weights are missing, invalid or incomplete, or generation_config.json is invalid.
    """
    config = _read_json_object(folder / "config.json", key)
    if not any(folder.glob(_WEIGHTS)):
        raise UserError(
            f"{key}: {folder} has no weights ({_WEIGHTS})",
            "use a model with weights, or train from random weights: set an architecture instead of pretrained",
        )
    for weights in sorted(folder.glob(_WEIGHTS)):
        if not weights.is_file():
            raise UserError(f"{key}: {weights} is not a file", "complete the download")
    for index in folder.glob("*.index.json"):
        weight_map = _read_json_object(index, key).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"{key}: {len(missing)} of {len(names)} files in {index} are missing: {', '.join(missing[:3])}",
                "complete the download",
            )
    if (folder / "generation_config.json").exists():
        check_generation_keys(_read_json_object(folder / "generation_config.json", key))
    return config


def _read_json_object(path: Path, key: str) -> HuggingFaceConfig:
    remedy = "give the path of a Hugging Face model folder"
    if path.exists() and not path.is_file():
        raise UserError(f"{key}: {path} is not a file", remedy)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{key}: cannot read {path}: {error}", remedy) from None
    if not isinstance(value, dict):
        raise UserError(f"{key}: {path} contains a {type(value).__name__}, not keys and values", remedy)
    return value


def check_files(loaded: LoadedConfig) -> None:
    """Raise UserError if a file or folder that the config names is missing or unusable."""
    _check_storage(loaded.config.storage)
    for name, dataset in loaded.config.datasets.items():
        if dataset.files:
            dataset_files(loaded, name)
        evaluation_files(loaded, name)
    tokenizer = loaded.config.tokenizer
    if tokenizer.path:
        folder = loaded.resolve("tokenizer.path", tokenizer.path)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"tokenizer.path: {folder} has no tokenizer.json", "give the path of a Hugging Face tokenizer folder"
            )
    if tokenizer.chat_template:
        template = loaded.resolve("tokenizer.chat_template", tokenizer.chat_template)
        if not template.is_file():
            raise UserError(f"tokenizer.chat_template: {template} is not a file", "give the path of a Jinja file")


def _check_storage(storage: Storage) -> None:
    """Raise UserError if a root folder cannot be made, because there is a file in its place or above it."""
    for key in ("weights", "data", "scratch"):
        written = getattr(storage, key)
        if written is None:
            continue
        if written.startswith("~"):
            raise UserError(f"storage.{key} {written!r} starts with ~, which jobs do not expand", "write the full path")
        existing = next((path for path in (Path(written), *Path(written).parents) if os.path.lexists(path)), None)
        if key != "scratch" and existing and not existing.is_dir():  # scratch is on the nodes
            raise UserError(f"storage.{key} {written!r}: {existing} is not a folder", "name a folder, or a new path")


def dataset_files(loaded: LoadedConfig, name: str) -> list[Path]:
    """Return a dataset's own files: folders and globs are expanded, and the files of each pattern are sorted.

    Raises:
        UserError: a pattern matches nothing, or a file is empty, listed twice, or has an unusable name.
    """
    dataset = loaded.config.datasets[name]
    found = _found_files(loaded, dataset.files, f"datasets.{name}.files", dataset.format)
    return _checked_files(found, f"datasets.{name}.files", dataset.format, allow_empty=dataset.bad_rows == "skip")


def left_out_files(loaded: LoadedConfig, name: str) -> list[Path]:
    """Return the files in a dataset's folders that are no data, such as README.md."""
    dataset = loaded.config.datasets[name]
    found = _found_files(loaded, dataset.files, f"datasets.{name}.files", dataset.format)
    return [path for one in found for path in one.left_out]


def evaluation_files(loaded: LoadedConfig, name: str) -> list[Path]:
    """Return the evaluation files of a dataset's `decontaminate` section; [] without one. Raises as `dataset_files`."""
    settings = loaded.config.datasets[name].decontaminate
    if settings is None:
        return []
    key = f"datasets.{name}.decontaminate.files"
    return _checked_files(_found_files(loaded, settings.files, key, "auto"), key, "auto")


def _found_files(loaded: LoadedConfig, patterns: Sequence[str], key: str, file_format: str) -> list[FoundFiles]:
    """Return the files of each pattern; UserError if one matches nothing."""
    every = []
    for pattern in patterns:
        found = find_files(key, loaded.resolve(key, pattern), file_format)
        if not found.files:
            raise UserError(
                f"{key}: {pattern!r} matches no file in {loaded.folder}", "write paths relative to the config file"
            )
        every.append(found)
    return every


def _checked_files(every: Sequence[FoundFiles], key: str, file_format: str, allow_empty: bool = False) -> list[Path]:
    """Return the files of all patterns; UserError for a file that is empty, listed twice, or of no known format."""
    files: dict[Path, Path] = {}  # by the target of a symbolic link
    for found in every:
        for path in found.files:
            _check_file_name(key, path)
            check_format(key, path, file_format)
            if path.stat().st_size == 0 and not allow_empty:
                skipped = "" if key.endswith("decontaminate.files") else ", or set the dataset's bad_rows to skip"
                raise UserError(f"{key}: {path} is empty", f"fill or remove the file{skipped}")
            first = files.setdefault(path.resolve(), path)
            if first is not path:
                problem = f"{path} is listed twice" if first == path else f"{path} is the same file as {first}"
                raise UserError(f"{key}: {problem}", "list each file once")
    return list(files.values())


def _check_file_name(key: str, path: Path) -> None:
    """Raise UserError for braces, which Snakemake reads as wildcards, and for bytes that are not UTF-8 text."""
    bad = next((c for c in str(path) if c in "{}" or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000), None)
    if bad:
        raise UserError(
            f"{key}: the path {str(path)!r} contains {bad!r}, which Snakemake or JSON cannot represent",
            "rename the file or its folder",
        )
