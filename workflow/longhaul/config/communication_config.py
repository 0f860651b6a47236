"""Config section `communication` of a stage: precision of the gradient reduction, and compression with PowerSGD."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from longhaul.config.field_types import MAX_STEPS, FrozenModel, PositiveInt


class PowerSgd(FrozenModel):
    """Low-rank gradient compression with PowerSGD (arXiv:1905.13727).

    Each gradient matrix is sent as two low-rank matrices. The compression error is added to the next step's gradient.
    """

    rank: PositiveInt = Field(
        default=4, description="Rank of the two matrices. A higher rank is more exact and sends more bytes."
    )
    start_step: Annotated[int, Field(ge=2, le=MAX_STEPS)] = Field(
        default=10, description="Number of steps before compression starts. Use at least the number of warm-up steps."
    )


class Communication(FrozenModel):
    """Gradient reduction between data-parallel ranks.

    These keys change the training result. If one of them changes, the stage is trained again in a new weights folder.
    """

    data_type: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None,
        description="Precision of the gradient reduction; null: the stage's precision. Data parallelism only.",
    )
    powersgd: PowerSgd | None = Field(
        default=None,
        description="Compress gradients. Data parallelism with ZeRO stage 0 or 1 only. zero.overlap_comm has then no effect.",
    )
