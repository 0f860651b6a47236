"""Config section `schedule` of a stage: the learning rate over the steps; warm-up and decay in steps or as shares of them."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field

from longhaul.config.field_types import FrozenModel, StepsOrShare


class Schedule(FrozenModel):
    """The learning rate as a function of the optimizer step."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = Field(
        default="cosine",
        description="Shape after the warm-up. wsd: constant, then a linear decay (warmup-stable-decay).",
    )
    warmup_steps: StepsOrShare = Field(
        default=0,
        description="Steps in which the rate rises linearly from 0 to the peak; a number below 1, such as 0.03, is a share of "
        "the stage's steps, rounded up.",
    )
    decay_steps: StepsOrShare = Field(
        default=0,
        description="kind wsd: length of the linear decay at the end, in steps or as a share of the stage's steps below 1.",
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="Final learning rate divided by the peak learning rate."
    )

    def in_steps(self, steps: int) -> Schedule:
        """Return the schedule of a stage with `steps` steps: its shares as numbers of steps, rounded up."""
        lengths = {key: _in_steps(getattr(self, key), steps) for key in ("warmup_steps", "decay_steps")}
        return self.model_copy(update=lengths)


def _in_steps(length: float, steps: int) -> int:
    """Return a length in steps. Decimals count as they are written: 0.07 of 100 steps are 7, not the 8 of binary numbers."""
    return length if isinstance(length, int) else math.ceil(Decimal(str(length)) * steps)
