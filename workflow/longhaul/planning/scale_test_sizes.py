"""Plans the scale test: numbers of nodes, warm-up and measured steps, and the first stage with the batch of each number.

The micro batch and the accumulation are those of the full size. So a GPU's work is the same on every number of nodes, and its
speed can be compared. The global batch grows with the nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from longhaul.config.acceptance_limits import FEWEST_STEPS
from longhaul.config.model_size import ModelSize
from longhaul.config.stage_config import BadSteps, Stage
from longhaul.errors import UserError
from longhaul.planning.check_feasibility import check_memory
from longhaul.planning.check_parallel_layout import data_parallel_size
from longhaul.planning.gpu_memory import GIB, MemoryEstimate, estimate_gpu_memory, needed_gib
from longhaul.planning.plan import Plan, StagePlan

WARM_UP_STEPS = 5
"""Steps that are not measured: kernels are compiled, and the allocator and the network settle."""
STEPS = WARM_UP_STEPS + FEWEST_STEPS
PROFILED_STEPS = (STEPS + 2, STEPS + 4)
"""First and last step that is profiled on GPUs, after the measured ones; the profiler starts in the step before."""
_PILOT_NODES = 2
"""The default where more nodes train: most faults between nodes show on two of them."""


@dataclass(frozen=True)
class ScaleLadder:
    """The rungs of a scale test.

    rungs:    number of nodes -> the plan of the stage on this number of nodes, from the fewest
    left_out: number of nodes -> why the stage cannot be tried there
    """

    stage: str
    rungs: dict[int, StagePlan]
    left_out: dict[int, str]

    def before(self, nodes: int) -> int | None:
        """Return the rung before that of this number of nodes; None for the first one."""
        return max((count for count in self.rungs if count < nodes), default=None)


def scale_ladder(plan: Plan) -> ScaleLadder:
    """Return the scale test of a run. It has no rungs where the config turns it off."""
    full = plan.stages[0]
    rungs: dict[int, StagePlan] = {}
    left_out: dict[int, str] = {}
    for nodes in sorted(set(_node_counts(plan, full.stage))):
        try:
            rungs[nodes] = _rung(plan, full, nodes)
        except UserError as error:
            left_out[nodes] = error.message
    return ScaleLadder(full.name, rungs, left_out)


def _node_counts(plan: Plan, stage: Stage) -> Iterator[int]:
    wanted = plan.config.scale_test.nodes
    if wanted is None:
        wanted = (_PILOT_NODES,) if stage.nodes > _PILOT_NODES and plan.site.node.gpus else ()
    yield from (stage.nodes if nodes == "full" else nodes for nodes in wanted)


def _rung(plan: Plan, full: StagePlan, nodes: int) -> StagePlan:
    """Return the plan of the stage on this number of nodes. Raises UserError if it does not fit."""
    if nodes > full.stage.nodes:
        raise UserError(f"stage {full.name} has {full.stage.nodes} nodes", "")
    if full.sizes is None and nodes < full.stage.nodes:
        raise UserError("the size of the model is known after `longhaul fetch`", "")
    world_size = nodes * full.stage.gpus_per_node
    profiled = PROFILED_STEPS if plan.site.node.gpus else None
    steps = profiled[1] if profiled else STEPS
    data_parallel = data_parallel_size(full.stage.model_copy(update={"nodes": nodes}), world_size)
    stage = full.stage.model_copy(
        update={
            "nodes": nodes,
            "global_batch_size": full.stage.micro_batch_size * full.accumulation * data_parallel,
            "steps": steps,
            "tokens": None,
            "epochs": None,
            "export": "none",
            "profile_steps": profiled,
            "skip_batches": (),
            "evaluate": None,
            "serve": None,
            "serve_check": None,
            "bad_steps": BadSteps(policy="skip", limit=steps),
        }
    )
    memory = estimate_gpu_memory(stage, full.sizes, world_size, bool(plan.site.node.gpus)) if full.sizes else None
    if memory and full.sizes and nodes < full.stage.nodes:
        _require_memory(plan, stage, memory, full.sizes)
    return replace(
        full,
        stage=stage,
        steps=steps,
        tokens_per_step=stage.global_batch_size * stage.sequence_length,
        world_size=world_size,
        data_parallel=data_parallel,
        memory=memory,
        asynchronous_saves=False,
        exported_checkpoints=(),
    )


def _require_memory(plan: Plan, stage: Stage, memory: MemoryEstimate, sizes: ModelSize) -> None:
    check_memory(stage, memory, sizes, plan.site)
    limit_gib = plan.site.node.gpu_memory_gib
    if limit_gib and memory.total > limit_gib * GIB:
        raise UserError(
            f"stages.{stage.name} needs {needed_gib(memory.total)} GiB per GPU on {stage.nodes} nodes; site {plan.site.name} has "
            f"{limit_gib:g} GiB",
            "",
        )
