"""A batch and a validation without a token in the loss are no success."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from longhaul.errors import UserError
from longhaul.train import validation_loss as validation
from longhaul.train.checkpoint.training_state import TrainingState
from longhaul.train.trainer import require_loss_tokens


def test_a_batch_without_loss_tokens_is_refused_until_it_is_skipped():
    require_loss_tokens(1, 7, 3)
    with pytest.raises(UserError, match="batch 7, after 3 steps, holds no loss token") as caught:
        require_loss_tokens(0, 7, 3)
    assert caught.value.hint.startswith("add 7 to the stage's skip_batches")
    state = TrainingState(step=7)
    assert state.next_batch == 7
    state.skip({7})
    assert state.next_batch == 8


def test_a_batch_that_was_trained_on_is_not_skipped_until_the_stage_restarts():
    state = TrainingState(step=3)
    with pytest.raises(
        UserError, match=r"batch 1 cannot .*\s+remedy: remove it from skip_batches, or set restart: true"
    ):
        state.skip({1})
    state.skip(set())
    TrainingState().skip({1})


@pytest.mark.parametrize(("loss_tokens", "expected"), [([2, 2], 3.0), ([0, 0], None)])
def test_a_validation_without_loss_tokens_has_no_loss(
    monkeypatch: pytest.MonkeyPatch, loss_tokens: list[int], expected: float | None
):
    """A loss of 0.0 would make that checkpoint the best one."""
    batches = [SimpleNamespace(loss_tokens=count) for count in loss_tokens]
    monkeypatch.setattr(validation, "_validation_batches", lambda *_: batches)
    backend = SimpleNamespace(evaluate=lambda micro: 3.0 * micro.loss_tokens)
    context = SimpleNamespace(sum=float, sums_on_device=torch.tensor, dims=SimpleNamespace(counts_samples=True))
    found = validation.validation_loss(cast(Any, backend), cast(Any, None), cast(Any, None), cast(Any, context))
    assert found == expected
