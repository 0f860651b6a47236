"""The folder of a stage's weights belongs to one identity; an edited one is refused until it is moved away."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longhaul.artifacts.paths import WeightsFolder
from longhaul.errors import UserError
from longhaul.train.checkpoint.weights_folder import claim_weights_folder
from tests.support.small_configs import base_stage

IDENTITY = {"spec": {"seed": 1}, "pretrained": None, "data": "d", "tokenizer": "t", "start": None}
ALONE: Any = SimpleNamespace(is_main=True, barrier=lambda: None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "identity.json"),
        (
            json.dumps({**IDENTITY, "data": "other"}),
            "`data` of these weights is other, that of the planned weights is d",
        ),
    ],
)
def test_edited_identity_is_refused_until_the_folder_is_moved_away(text: str, message: str, tmp_path: Path):
    folder, job = tmp_path / "weights/0123", base_stage(tmp_path)
    claim_weights_folder(job, IDENTITY, folder, ALONE)
    WeightsFolder(folder).identity.write_text(text)
    with pytest.raises(UserError, match=f"{message}.*\\n  remedy: .*move it away"):
        claim_weights_folder(job, IDENTITY, folder, ALONE)
    folder.rename(tmp_path / "moved-away")
    claim_weights_folder(job, IDENTITY, folder, ALONE)
    assert json.loads(WeightsFolder(folder).identity.read_text()) == {**IDENTITY, "steps": job.steps}
