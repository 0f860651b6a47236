"""Config section `serve_check` of a stage: the check of a server of the stage's exported model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from longhaul.config.field_types import FrozenModel, Minutes, Timeout

MOST_STREAMS = 64
StreamCount = Annotated[int, Field(ge=1, le=MOST_STREAMS)]


class ServeCheck(FrozenModel):
    """Check of a server of a stage's export: its answers, its speed under load, and that no process of it is left.

    The server has the shape that the section `serve` describes.
    """

    streams: Annotated[tuple[StreamCount, ...], Field(min_length=1, max_length=8)] = Field(
        default=(1, 8, 64),
        description=f"Numbers of requests at the same time, at most {MOST_STREAMS}. The check measures the server with each.",
    )
    answer_tokens: Annotated[int, Field(ge=2, le=4096)] = Field(
        default=32, description="Tokens of an answer. Answers of `transformers serve` end earlier where the text ends."
    )
    start_timeout_s: Timeout = Field(
        default=1800.0, description="Time limit from the start of the server to its first answer, in seconds."
    )
    minutes: Minutes = Field(
        default=60, description="Time limit of the job, in minutes or as hours:minutes:00, for example 1:30:00."
    )

    @model_validator(mode="after")
    def _check_streams(self) -> ServeCheck:
        if list(self.streams) != sorted(set(self.streams)):
            raise ValueError(f"streams {list(self.streams)}: the numbers must increase")
        return self
