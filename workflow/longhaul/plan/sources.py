"""What a config refers to outside itself: data files, tokenizer and model folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longhaul.artifacts import Lock
from longhaul.config.load import LoadedConfig
from longhaul.errors import UserError


def model_config(loaded: LoadedConfig, lock: Lock | None) -> dict[str, Any] | None:
    """The model's Hugging Face config; None while it is on the hub and not fetched."""
    pretrained = loaded.config.model.pretrained
    if pretrained is None:
        return loaded.config.model.config_dict()
    if pretrained.hub:
        return lock.model if lock and lock.model else None
    path = loaded.resolve(pretrained.path or "") / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.pretrained.path: cannot read {path}: {error}", "name a Hugging Face model folder"
        ) from None


def check_files(loaded: LoadedConfig) -> None:
    for name, dataset in loaded.config.datasets.items():
        if dataset.files:
            dataset_files(loaded, name)
        evaluation_files(loaded, name)
    tokenizer = loaded.config.tokenizer
    if tokenizer.path and not (loaded.resolve(tokenizer.path) / "tokenizer.json").is_file():
        raise UserError(
            f"tokenizer.path: {loaded.resolve(tokenizer.path)} holds no tokenizer.json",
            "name a Hugging Face tokenizer folder",
        )
    if tokenizer.chat_template and not loaded.resolve(tokenizer.chat_template).is_file():
        raise UserError(
            f"tokenizer.chat_template: {loaded.resolve(tokenizer.chat_template)} does not exist", "name a Jinja file"
        )


def dataset_files(loaded: LoadedConfig, name: str) -> list[Path]:
    """A dataset's own files, globs expanded, sorted within each pattern; UserError for a pattern that finds none."""
    return _matches(loaded, loaded.config.datasets[name].files, f"datasets.{name}.files")


def evaluation_files(loaded: LoadedConfig, name: str) -> list[Path]:
    """The files whose texts a dataset must not hold, as `dataset_files`; none unless it is to be decontaminated."""
    settings = loaded.config.datasets[name].decontaminate
    return _matches(loaded, settings.files, f"datasets.{name}.decontaminate.files") if settings else []


def _matches(loaded: LoadedConfig, patterns: Sequence[str], key: str) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        paths = _expand(loaded.resolve(pattern))
        if not paths:
            raise UserError(
                f"{key}: nothing matches {pattern!r} (looked in {loaded.folder})",
                "paths are relative to the config file",
            )
        for path in paths:
            if path.stat().st_size == 0:
                raise UserError(f"{key}: {path} is empty", "remove it from the list, or fill it")
            if path in found:
                raise UserError(f"{key}: {path} is listed twice", "list every file once")
            found.append(path)
    return found


def _expand(pattern: Path) -> list[Path]:
    if pattern.is_file():
        return [pattern]
    if pattern.is_dir():
        return sorted(p for p in pattern.rglob("*") if p.is_file() and not p.name.startswith("."))
    anchor = Path(pattern.anchor)
    return sorted(p for p in anchor.glob(str(pattern.relative_to(anchor))) if p.is_file())
