"""Dropout masks follow from seed, step and rank: repeated, killed and resumed trainings have the same losses, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.parity.tokenizer_and_shards import write_shared_data
from tests.recovery.trained_stages import HALF, TrainedStage, train


@dataclass
class DropoutStage(TrainedStage):
    """A stage of a model with dropout."""

    dropout: float = 0.3

    def as_json(self, shared: Path) -> dict[str, Any]:
        attempt = super().as_json(shared)
        attempt["run"]["model"] = {"llama": {**attempt["run"]["model"]["llama"], "attention_dropout": self.dropout}}
        return attempt


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DropoutStage]:
    """A stage saves after 3, 6, 9 and 12 steps; killed ones are started again."""
    folder = tmp_path_factory.mktemp("dropout")
    kinds: dict[str, dict[str, Any]] = {
        "first": {},
        "repeated": {},
        "killed before the first save": {"faults": {"kill_at_step": 2}},
        "killed after a save": {"faults": {"kill_at_step": HALF + 1}},
        "without dropout": {"dropout": 0.0},
    }
    found = {name: DropoutStage(folder / name, 2, **keys) for name, keys in kinds.items()}
    resumed = [DropoutStage(stage.folder, 2) for stage in found.values() if stage.faults]
    train(write_shared_data(folder / "shared"), *found.values(), *resumed)
    return found


@pytest.mark.parametrize("name", ["repeated", "killed before the first save", "killed after a save"])
def test_losses_do_not_depend_on_the_attempts(stages: dict[str, DropoutStage], name: str):
    assert stages[name].losses() == stages["first"].losses()


def test_dropout_is_active(stages: dict[str, DropoutStage]):
    assert stages["first"].losses() != stages["without dropout"].losses()
