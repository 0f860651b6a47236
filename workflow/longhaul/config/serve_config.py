"""Config section `serve` of a stage: nodes, requests, port and time limit of the job that serves its exported model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from longhaul.config.field_types import FrozenModel, HardwareCount, Minutes


class Serve(FrozenModel):
    """The job that `longhaul serve CONFIG STAGE` starts. It serves the stage's export with an OpenAI-compatible API."""

    nodes: HardwareCount | None = Field(
        default=None, description="Number of nodes; null: the fewest that hold the weights and the KV cache."
    )
    gpus_per_node: HardwareCount | None = Field(
        default=None,
        description="GPUs of each node; null: the fewest that suffice on one node, all on several nodes and on exclusive nodes.",
    )
    context: Annotated[int, Field(ge=1, le=10**8)] | None = Field(
        default=None,
        description="Longest request, in tokens: prompt and answer together; null: the model's max_position_embeddings.",
    )
    concurrency: Annotated[int, Field(ge=1, le=10**6)] = Field(
        default=1,
        description="Number of requests of this length that the KV cache holds at once. More and shorter requests share it.",
    )
    max_running_requests: Annotated[int, Field(ge=1, le=10**6)] | None = Field(
        default=None,
        description="Maximum number of requests that the engine answers at the same time; further ones wait. null: "
        "the engine's default. Only vllm and sglang have this limit.",
    )
    expert_parallel: bool = Field(
        default=False,
        description="In a mixture of experts, each of the GPUs that share a layer holds whole experts, instead of a part of "
        "every expert. Only vllm and sglang do so, on GPUs.",
    )
    port: Annotated[int, Field(ge=1024, le=65535)] | None = Field(
        default=None, description="Port of the server on its first node; null: a free one at each start."
    )
    start_timeout_s: Annotated[int, Field(ge=1, le=86400)] = Field(
        default=3600,
        description="Time limit from the start of the server to its first answer, in seconds, with the time to load "
        "the model.",
    )
    drain_s: Annotated[int, Field(ge=0, le=86400)] = Field(
        default=60,
        description="Time before the end of an allocation, in seconds, in which vllm and sglang finish accepted requests.",
    )
    minutes: Minutes = Field(
        default=60,
        description="Time limit of one allocation, in minutes or as hours:minutes:00, for example 1:30:00. Before it ends, the "
        "server starts again in another allocation.",
    )

    @model_validator(mode="after")
    def _check_running_requests(self) -> Serve:
        if self.max_running_requests and self.max_running_requests < self.concurrency:
            raise ValueError(
                f"max_running_requests {self.max_running_requests} is less than concurrency {self.concurrency}: the KV cache "
                "would be larger than what can be used; reduce concurrency"
            )
        return self
