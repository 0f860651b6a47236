"""Fields of an export's `provenance`: the checkpoint that it was made from, and facts that readers look for."""

from __future__ import annotations

from typing import NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from longhaul.artifacts.typed_json import Sha256


class Provenance(TypedDict):
    """Origin of an exported model. Nothing computes with its other keys, which model card and report show.

    checkpoint_sha256: of the checkpoint's manifest
    """

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    checkpoint_sha256: NotRequired[Sha256]
