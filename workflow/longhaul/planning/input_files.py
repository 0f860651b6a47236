"""What a config refers to outside itself: data files, tokenizer and model folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longhaul.artifacts.schemas import Lock
from longhaul.config.load import LoadedConfig
from longhaul.config.pretrained_format import as_trained, fp8_block, notes, safetensors_header
from longhaul.errors import UserError


def model_config(loaded: LoadedConfig, lock: Lock | None) -> dict[str, Any] | None:
    """The model's Hugging Face config; None while it is on the hub and not fetched.

    Raises:
        UserError: the pretrained weights are missing, or stored in a way that training cannot start from.
    """
    if loaded.config.model.pretrained is None:
        return loaded.config.model.config_dict()
    stored = _stored_config(loaded, lock)
    if stored is None:
        return None
    fp8_block(stored, "model.pretrained")
    return as_trained(stored)


def first_weights_notes(loaded: LoadedConfig, lock: Lock | None) -> tuple[str, ...]:
    """How the first weights differ from those in the pretrained folder, in words."""
    stored = _stored_config(loaded, lock) if loaded.config.model.pretrained else None
    return notes(stored) if stored else ()


def _stored_config(loaded: LoadedConfig, lock: Lock | None) -> dict[str, Any] | None:
    """The pretrained folder's config.json."""
    pretrained = loaded.config.model.pretrained
    if pretrained is None or pretrained.hub:
        return lock.model if lock and lock.model else None
    return model_folder(loaded.resolve("model.pretrained.path", pretrained.path or ""), "model.pretrained.path")


_WEIGHTS = "*.safetensors"  # pickles are not read


def model_folder(folder: Path, where: str) -> dict[str, Any]:
    """The config.json of a Hugging Face folder that holds all its weights; UserError, naming the key `where`, for any other."""
    config = _json_object(folder / "config.json", where)
    if not any(folder.glob(_WEIGHTS)):
        raise UserError(
            f"{where}: {folder} holds no weights ({_WEIGHTS})",
            "name a model with weights, or train from the start: an architecture in place of pretrained",
        )
    for weights in sorted(folder.glob(_WEIGHTS)):
        safetensors_header(weights)  # a download that ended early is refused before a job waits for its nodes
    for index in folder.glob("*.index.json"):
        listed = _json_object(index, where).get("weight_map")
        names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"{where}: {index} names {', '.join(missing[:3])}, not there ({len(missing)} of {len(names)} files)",
                "finish the download",
            )
    return config


def _json_object(path: Path, where: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot read {path}: {error}", "name a Hugging Face model folder") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: {path} holds a {type(value).__name__}, not keys and values", "name a Hugging Face model folder"
        )
    return value


def check_files(loaded: LoadedConfig) -> None:
    for name, dataset in loaded.config.datasets.items():
        if dataset.files:
            dataset_files(loaded, name)
        evaluation_files(loaded, name)
    tokenizer = loaded.config.tokenizer
    if tokenizer.path:
        folder = loaded.resolve("tokenizer.path", tokenizer.path)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"tokenizer.path: {folder} holds no tokenizer.json", "name a Hugging Face tokenizer folder")
    if tokenizer.chat_template:
        template = loaded.resolve("tokenizer.chat_template", tokenizer.chat_template)
        if not template.is_file():
            raise UserError(f"tokenizer.chat_template: {template} is no file", "name a Jinja file")


def dataset_files(loaded: LoadedConfig, name: str) -> list[Path]:
    """A dataset's own files, globs expanded, sorted within each pattern; UserError for a pattern that finds none."""
    dataset = loaded.config.datasets[name]
    return _matches(loaded, dataset.files, f"datasets.{name}.files", empty_is_counted=dataset.bad_rows == "skip")


def evaluation_files(loaded: LoadedConfig, name: str) -> list[Path]:
    """The files whose texts a dataset must not hold, as `dataset_files`; none unless it is to be decontaminated."""
    settings = loaded.config.datasets[name].decontaminate
    return _matches(loaded, settings.files, f"datasets.{name}.decontaminate.files") if settings else []


def _matches(loaded: LoadedConfig, patterns: Sequence[str], key: str, empty_is_counted: bool = False) -> list[Path]:
    found: dict[Path, Path] = {}  # by what a link leads to
    for pattern in patterns:
        paths = _expand(loaded.resolve(key, pattern))
        if not paths:
            raise UserError(
                f"{key}: nothing matches {pattern!r} (looked in {loaded.folder})",
                "paths are relative to the config file",
            )
        for path in paths:
            _check_name(key, path)
            if path.stat().st_size == 0 and not empty_is_counted:
                raise UserError(f"{key}: {path} is empty", "remove it from the list, or fill it")
            first = found.setdefault(path.resolve(), path)
            if first is not path:
                told = f"{path} is listed twice" if first == path else f"{path} is the same file as {first}"
                raise UserError(f"{key}: {told}", "list every file once")
    return list(found.values())


def _check_name(key: str, path: Path) -> None:
    """Snakemake takes braces in an input for wildcards, and no JSON holds bytes that are no text."""
    bad = next((c for c in str(path) if c in "{}" or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000), None)
    if bad:
        raise UserError(
            f"{key}: {str(path)!r} holds {bad!r}, which Snakemake or JSON cannot pass on as it is",
            "rename the file or its folder",
        )


def _expand(pattern: Path) -> list[Path]:
    if pattern.is_file():
        return [pattern]
    if pattern.is_dir():
        return sorted(p for p in pattern.rglob("*") if p.is_file() and not p.name.startswith("."))
    anchor = Path(pattern.anchor)
    return sorted(p for p in anchor.glob(str(pattern.relative_to(anchor))) if p.is_file())
