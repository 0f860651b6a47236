"""Key `scale_test` of a run config: numbers of nodes on which the first stage is tried before it trains, and their limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainValidator

from longhaul.config.acceptance_limits import COMMUNICATION_EFFICIENCY, GPU_MEMORY, GPU_UTILISATION, STEP_TIME_SPREAD
from longhaul.config.field_types import MAX_HARDWARE, FrozenModel, HardwareCount, Minutes


def _node_count(value: object) -> object:
    """Check one item of `nodes` by hand: for a union, pydantic would print one message per type."""
    if value == "full" or (type(value) is int and 1 <= value <= MAX_HARDWARE):
        return value
    raise ValueError(f"{value!r} is no number of nodes from 1 to {MAX_HARDWARE}, and not full")


NodeCount = Annotated[
    int | Literal["full"], PlainValidator(_node_count, json_schema_input_type=HardwareCount | Literal["full"])
]
NodeCounts = tuple[NodeCount, ...]
Share = Annotated[float, Field(ge=0, le=1)]


class ScaleTest(FrozenModel):
    """Short trainings of the first stage on a growing number of nodes, before it trains. Each must keep the limits."""

    nodes: NodeCounts | None = Field(
        default=None,
        description="Numbers of nodes; full: all nodes of the stage. null: 2 if GPUs train the stage on more than 2 "
        "nodes, else none. The plan leaves out numbers on which the stage does not fit, and names them.",
    )
    minutes: Minutes = Field(
        default=30, description="Time limit of each allocation, in minutes or as hours:minutes:00."
    )
    max_step_time_spread: Annotated[float, Field(gt=0, le=1000)] = Field(
        default=STEP_TIME_SPREAD,
        description="Maximum distance of the middle 90 % of step times from their median, as a share of it.",
    )
    max_gpu_memory: Share = Field(
        default=GPU_MEMORY, description="Maximum share of a GPU's memory at the peak, on the fullest GPU."
    )
    min_gpu_utilisation: Share = Field(
        default=GPU_UTILISATION, description="Minimum median share of time in which a kernel runs on rank 0's GPU."
    )
    min_communication_efficiency: Share = Field(
        default=COMMUNICATION_EFFICIENCY,
        description="Minimum share of three profiled steps in which rank 0 and the last rank do not wait for communication.",
    )
    min_efficiency: Share = Field(
        default=0.8,
        description="Minimum tokens per second and GPU, as a share of those on the fewest nodes of the test.",
    )


def _section_of(value: object) -> object:
    """Return the section that a short form stands for: `off`, or the list of numbers of nodes.

    pydantic takes the result for Python's values, where only a tuple is a tuple.
    """
    if value == "off":
        return {"nodes": ()}
    section = {"nodes": value} if isinstance(value, list) else value
    if isinstance(section, ScaleTest):
        return section
    if not isinstance(section, dict):
        raise ValueError(f"{section!r} is no section; write off, numbers of nodes such as [1, 2, full], or a section")
    return {**section, "nodes": tuple(section["nodes"])} if isinstance(section.get("nodes"), list) else section


# `off`, a list of numbers of nodes, or a section.
ScaleTestOrShortForm = Annotated[
    ScaleTest, BeforeValidator(_section_of, json_schema_input_type=Literal["off"] | NodeCounts | ScaleTest)
]
