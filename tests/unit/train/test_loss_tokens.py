"""A batch and a validation without a token in the loss are no success."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from longhaul.errors import UserError
from longhaul.train import validation_loss as validation
from longhaul.train.trainer import require_loss_tokens


def test_a_batch_without_loss_tokens_is_refused():
    require_loss_tokens(1, 7, 3)
    with pytest.raises(UserError, match="batch 7, after 3 steps, holds no loss token") as caught:
        require_loss_tokens(0, 7, 3)
    assert "skip_batches" in (caught.value.hint or "")


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
