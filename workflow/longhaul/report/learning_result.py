"""Says whether a stage learned: a pretraining ends below the entropy of the token frequencies, another stage below its start."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from pydantic import ConfigDict
from typing_extensions import TypedDict

from longhaul.artifacts.paths import RunPaths
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.errors import UserError
from longhaul.report.plan_json import StageRow

_PRETRAIN = "pretrain"


class _DataFields(TypedDict):
    """Key of a dataset's manifest that is read here."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    unigram_entropy_nats: float


@dataclass(frozen=True)
class LearningResult:
    """Whether a stage learned.

    level: loss in nats per token that it should end below
    """

    learned: bool
    level: float


def learning_result(
    kind: str, loss: float | None, first_validation_loss: float | None, unigram_entropy_nats: float | None
) -> LearningResult | None:
    """Return whether a stage learned; None as long as this is not known.

    loss: the last validation loss; without a validation after the first step the last training loss
    unigram_entropy_nats: loss of a model that only counts tokens, on the stage's data
    """
    level = unigram_entropy_nats if kind == _PRETRAIN else first_validation_loss
    return None if loss is None or level is None else LearningResult(loss < level, level)


def read_unigram_entropies(paths: RunPaths, rows: Iterable[StageRow]) -> dict[str, float]:
    """Return dataset -> entropy in nats per token, for the datasets of pretrainings whose manifest exists and can be read."""
    manifests = {row["dataset"]: paths.manifest(row["dataset"]) for row in rows if row["kind"] == _PRETRAIN}
    found: dict[str, float] = {}
    for name, path in manifests.items():
        with suppress(UserError):
            found[name] = read_typed_json(path, _DataFields)["unigram_entropy_nats"]
    return found
