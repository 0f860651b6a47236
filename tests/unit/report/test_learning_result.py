"""Whether a stage learned is the same in status, summary and report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longhaul.report.learning_result import LearningResult, learning_result
from tests.support.run_folder import RunFolder


@pytest.mark.parametrize(
    ("kind", "loss", "first_validation_loss", "entropy_nats", "expected"),
    [
        ("pretrain", 5.4, 8.3, 6.8, LearningResult(True, 6.8)),
        ("pretrain", 6.8, 8.3, 6.8, LearningResult(False, 6.8)),
        ("pretrain", 5.4, 8.3, None, None),
        ("sft", 5.4, 6.3, 6.8, LearningResult(True, 6.3)),
        ("sft", 6.4, 6.3, 6.8, LearningResult(False, 6.3)),
        ("sft", 5.4, None, 6.8, None),
        ("sft", None, 6.3, 6.8, None),
    ],
)
def test_pretraining_is_compared_with_the_token_frequencies_and_other_stages_with_their_start(
    kind: str,
    loss: float | None,
    first_validation_loss: float | None,
    entropy_nats: float | None,
    expected: LearningResult | None,
) -> None:
    assert learning_result(kind, loss, first_validation_loss, entropy_nats) == expected


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        ({"unigram_entropy_nats": 4.6, "dataset": "prose"}, LearningResult(True, 4.6)),
        ({"unigram_entropy_nats": 4.4}, LearningResult(False, 4.4)),
        ({"unigram_entropy_nats": "4.6"}, None),
        (None, None),
    ],
    ids=["below", "above", "damaged", "missing"],
)
def test_status_reads_the_entropy_of_the_data(
    tmp_path: Path, manifest: dict[str, object] | None, expected: LearningResult | None
) -> None:
    """The last validation loss of the stage is 4.5. A manifest that cannot be read does not stop a status."""
    run = RunFolder(tmp_path)
    run.train(10)
    path = run.paths.manifest("prose")
    path.parent.mkdir(parents=True)
    if manifest is not None:
        path.write_text(json.dumps(manifest))
    assert run.status().stages[0].learning == expected


def test_without_validation_the_training_loss_counts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    weights = run.train(10)
    trained = [line for line in weights.metrics.read_text().splitlines() if "validation" not in line]
    weights.metrics.write_text("\n".join(trained) + "\n")
    run.paths.manifest("prose").parent.mkdir(parents=True)
    run.paths.manifest("prose").write_text('{"unigram_entropy_nats": 4.95}')
    assert run.status().stages[0].learning == LearningResult(True, 4.95)


def test_validation_before_the_first_step_does_not_say_what_was_learned(tmp_path: Path) -> None:
    """A stage that was stopped before its second validation has a training loss of 4.95."""
    run = RunFolder(tmp_path)
    weights = run.train(10)
    weights.metrics.write_text("".join(weights.metrics.read_text().splitlines(keepends=True)[:-1]))
    run.paths.manifest("prose").parent.mkdir(parents=True)
    run.paths.manifest("prose").write_text('{"unigram_entropy_nats": 5.2}')
    (stage,) = run.status().stages
    assert stage.progress and stage.progress.validation_loss == 5.5
    assert stage.learning == LearningResult(True, 5.2)
    plan = json.loads(run.paths.plan.read_text())
    plan["stages"][0]["kind"] = "sft"
    run.paths.plan.write_text(json.dumps(plan))
    assert run.status().stages[0].learning == LearningResult(True, 5.5)
