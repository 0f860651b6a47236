"""Copies a run's config and its site file into the run's folder, so that the copy means the same at its new place."""

from __future__ import annotations

import json
import re
from pathlib import Path

from longhaul.artifacts.atomic_files import write_text
from longhaul.config.load_config import LoadedConfig, names_a_file
from longhaul.config.strict_yaml import WrittenText, written_texts

_SITE = "site.yaml"
_PATHS = (
    "tokenizer.path",
    "tokenizer.chat_template",
    "model.pretrained.path",
    "datasets.*.files.*",
    "datasets.*.decontaminate.files.*",
)
_PATHS_OR_NAMES = ("site", "stages.*.evaluate.files.*")
"""Keys with paths that are relative to the config file. A name of a shipped file is no path."""
_ANCHOR = re.compile(r"&\S+\s+")


def copy_config(loaded: LoadedConfig, copy: Path) -> None:
    """Write the config to `copy` with full paths, and a site file of the user beside it. All else stays as it is written."""
    text = loaded.path.read_text(encoding="utf-8")
    for written in reversed(written_texts(text)):
        if (value := _at_new_place(loaded, written)) != written.value:
            text = text[: written.start] + _quoted(value, text[written.start : written.end]) + text[written.end :]
    if names_a_file(loaded.config.site):
        write_text(copy.with_name(_SITE), loaded.site_path.read_text(encoding="utf-8"))
    else:
        copy.with_name(_SITE).unlink(missing_ok=True)  # of an earlier config
    write_text(copy, text)


def _at_new_place(loaded: LoadedConfig, written: WrittenText) -> str:
    key, value = ".".join(written.keys), written.value
    is_path = _is_one_of(written.keys, _PATHS) or (_is_one_of(written.keys, _PATHS_OR_NAMES) and names_a_file(value))
    if not is_path:
        return value
    return _SITE if key == "site" else str(loaded.resolve(key, value))


def _is_one_of(keys: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    split = (pattern.split(".") for pattern in patterns)
    return any(
        len(parts) == len(keys) and all(p in ("*", k) for p, k in zip(parts, keys, strict=True)) for parts in split
    )


def _quoted(value: str, before: str) -> str:
    """Return a value as YAML in quotes, in place of `before`: with its anchor, and its line break if it is a block."""
    anchor = _ANCHOR.match(before)
    line_break = "\n" if before.endswith("\n") else ""
    return (anchor[0] if anchor else "") + json.dumps(value, ensure_ascii=False) + line_break
