"""Checks the JSON files beside a user's tokenizer.json: types of values, and names that transformers' classes use themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from longhaul.artifacts.typed_json import read_typed_json
from longhaul.config.reserved_keys import TOKENIZER_CLASSES, refuse_own_names
from longhaul.errors import UserError

_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_Token = str | dict[str, Any] | None
_Length = Annotated[float, Field(ge=0)] | None
"""A number of tokens. Python writes Infinity for no limit."""


class _NamedTemplate(BaseModel):
    name: str
    template: str


class _TokenizerKeys(BaseModel):
    """Keys whose values the tokenizer job computes with."""

    model_max_length: _Length = None
    max_len: _Length = None
    chat_template: str | dict[str, str] | tuple[_NamedTemplate, ...] | None = None
    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    sep_token: _Token = None
    pad_token: _Token = None
    cls_token: _Token = None
    mask_token: _Token = None


def check_tokenizer_keys(folder: Path) -> None:
    """Raise UserError if a file is no JSON object, or a key of it would end the tokenizer job."""
    for path in (folder / name for name in _FILES):
        if path.exists():
            _check_file(path)


def _check_file(path: Path) -> None:
    # Nobody can correct the file of a Hub repository, and a change in the cache would be lost with it.
    remedy = f"correct {path.name}; for a tokenizer.hub, do it in a copy of its folder, and use that as tokenizer.path"
    keys = read_typed_json(path, dict[str, Any], remedy)
    read_typed_json(path, _TokenizerKeys, remedy)
    try:
        refuse_own_names(keys, TOKENIZER_CLASSES, "tokenizer")
    except ValueError as error:
        raise UserError(f"{path}: {error}", remedy) from None
