"""Patches of DeepSpeed's engine: gradient norm and clipping, skipped updates, files of checkpoints, experts, sliced models.
Written for DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import new_class
from typing import Any

import torch

Engine = Any
"""DeepSpeed's engine. DeepSpeed declares no types, and adds methods and attributes to its engine at run time."""

# Checkpoints


def save_without_recovery_script(engine: Engine) -> None:
    """Stop `engine.save_checkpoint` from copying zero_to_fp32.py and zero_to_torch.py beside the checkpoint.

    No setting turns that off. The scripts would lie in the folder of all checkpoints and in no manifest, and
    `longhaul export` reads the checkpoints itself. Upstream: DeepSpeed pull request 892 added the copy.
    """
    engine._copy_recovery_script = lambda _folder: None


@contextmanager
def files_read_with(engine: Engine, load: Callable[..., Any]) -> Iterator[None]:
    """Let `engine.load_checkpoint` read every file through `load(path, classes, map_location)` for the length of the block.

    DeepSpeed's own checkpoint engines call torch.load with weights_only=False: a file could run any code. No setting changes
    that. `classes` are those whose objects DeepSpeed saves together with tensors and plain data.

    Upstream: DeepSpeed pull request 6094 asked for weights_only=True and was closed; 6751 made False explicit.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)

    class Reader(TorchCheckpointEngine):
        def load(self, path: str, map_location: Any = None) -> Any:
            return load(path, classes, map_location)

    usual, engine.checkpoint_engine = engine.checkpoint_engine, Reader()
    try:
        yield
    finally:
        engine.checkpoint_engine = usual


# The optimizer step


def inner_optimizer(engine: Engine) -> Any:
    """Return the optimizer that updates the master weights.

    A ZeRO optimizer and the fp16 optimizer wrap it in their attribute `optimizer`. At ZeRO 0 in fp32 it is the engine's own.
    DeepSpeed has no public function that returns it.
    """
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def has_wrapped_optimizer(engine: Engine) -> bool:
    """Return whether a ZeRO or 16-bit optimizer wraps the one that updates the master weights. No public function says so."""
    return hasattr(engine.optimizer, "optimizer")


def wrap_optimizer_step(engine: Engine, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the inner optimizer's `step` with `wrap(step)`.

    DeepSpeed has no hook between the gradient norm and the update: `engine.step` does both. ZeRO calls the inner step once for
    each parameter group, after it has computed the norm and clipped.
    """
    optimizer = inner_optimizer(engine)
    optimizer.step = wrap(optimizer.step)


def call_before_update(engine: Engine, action: Callable[[], None]) -> None:
    """Call `action` before each update of weights and optimizer states.

    `engine.step` calls the outer optimizer's `step` after the last micro batch of a step, and never elsewhere. torch's
    `register_step_pre_hook` exists on the inner optimizer alone, which ZeRO calls after it has begun to work.
    """
    optimizer = engine.optimizer
    update = optimizer.step

    def delayed_update(*arguments: Any, **options: Any) -> Any:
        action()
        return update(*arguments, **options)

    optimizer.step = delayed_update


def gradient_norm_before_update(engine: Engine) -> Any:
    """Return the global gradient norm while the inner step runs: a scalar tensor, or a number.

    `engine.get_global_grad_norm()` returns the norm of the previous step until `engine.step` is over. Upstream: as DeepSpeed
    pull request 1292 describes it.
    """
    return engine.optimizer._global_grad_norm


def take_over_clipping(engine: Engine) -> float:
    """Stop the ZeRO optimizer from clipping gradients. Return the largest norm that the config allows; 0: no clipping.

    ZeRO 1 and 2 read the norm on the CPU to clip, and every ZeRO stage clips in a pass of its own over the gradients.
    """
    limit, engine.optimizer.clip_grad = engine.optimizer.clip_grad, 0.0
    return limit


def measure_norm_in_fp32(engine: Engine) -> None:
    """Let ZeRO 1 and 2 measure the gradient norm in one pass over the gradients, without a wait of the CPU.

    DeepSpeed first converts every gradient to fp64, and copies a constant from the CPU's memory for every parameter group. The
    norm of experts that ranks divide is left to DeepSpeed: it is averaged over other ranks. Upstream: DeepSpeed pull request
    8331 can leave the norm out, but bad steps are found by it.
    """
    from deepspeed.runtime.utils import is_model_parallel_parameter

    optimizer = engine.optimizer
    if engine.zero_optimization_stage() not in (1, 2) or optimizer.has_moe_layers or optimizer.cpu_offload:
        return

    def global_norm(norm_type: int = 2) -> torch.Tensor:
        norms = [torch.zeros((), device=optimizer.device)]
        for group, parameters in enumerate(optimizer.params_in_partition):
            # The last partition ends with padding, which belongs to no parameter.
            gradients = (g for g in optimizer.averaged_gradients[group] if not getattr(g, "_zero_padding", False))
            for gradient, parameter in zip(gradients, parameters, strict=False):
                if is_model_parallel_parameter(parameter) or optimizer.model_parallel_rank == 0:
                    norms.append(torch.linalg.vector_norm(gradient, norm_type, dtype=torch.float32))
        square = torch.stack(norms).square().sum()
        torch.distributed.all_reduce(square, group=optimizer.dp_process_group)
        optimizer._model_parallel_all_reduce(tensor=square, op=torch.distributed.ReduceOp.SUM)
        return square.sqrt()

    optimizer.scaled_global_norm = global_norm


def gather_whole_layers(model: Any, layer_classes: list[type[torch.nn.Module]]) -> None:
    """Let ZeRO 3 gather all weights of a module of these classes at once, instead of one hook for each inner module.

    DeepSpeed documents the function, but declares no types.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, layer_classes)


def count_sliced_experts_in_gradient_norm(engine: Engine) -> None:
    """Let ZeRO 3 sum the gradient norm of experts over the tensor ranks, as it does for every parameter that they slice.

    `_grad_norm_counts_every_rank` assumes that experts with a group name come from DeepSpeed's AutoEP, which tensor ranks do
    not slice. longhaul's experts are sliced, and marked as sliced.
    """
    engine.optimizer._grad_norm_counts_every_rank = lambda *_arguments: False


def skip_averaging_over_one_rank(engine: Engine) -> None:
    """Leave gradients where they are if no other rank has some for the same weights. ZeRO 1 and 2.

    Without contiguous buffers, DeepSpeed copies the gradients into a flat tensor, divides it by one, reduces it over one rank,
    and copies it back.
    """
    if engine.zero_optimization_stage() not in (1, 2):
        return
    groups = (engine.optimizer.dp_process_group, *engine.optimizer.real_dp_process_group)
    if all(torch.distributed.get_world_size(group) == 1 for group in groups):
        engine.optimizer.buffered_reduce_fallback = lambda *_arguments, **_options: None


def average_gradients_with(engine: Engine, average: Callable[[], None]) -> None:
    """Call `average` instead of DeepSpeed's own averaging of gradients over the data ranks. ZeRO 0 and 1.

    The engine has no communication hook as DistributedDataParallel has one. At ZeRO 1 the optimizer still distributes the
    averaged gradients to the partitions, so its own all-reduce only flattens them. Upstream: DeepSpeed issue 886.
    """
    if not engine.zero_optimization_stage():
        engine.buffered_allreduce_fallback = lambda *_arguments, **_options: average()
        return
    optimizer = engine.optimizer
    distribute = optimizer.reduce_gradients

    def reduce_gradients(pipeline_parallel: bool = False) -> None:
        average()
        distribute(pipeline_parallel)

    optimizer.reduce_gradients = reduce_gradients
    optimizer.gradient_average = False
    optimizer.allreduce_bucket = lambda bucket, *_arguments, **_options: optimizer.flatten(bucket)


def gradient_attribute(engine: Engine) -> str:
    """Return the name of the parameters' attribute in which DeepSpeed accumulates gradients at ZeRO 0 and 1.

    Which attribute it is depends on private settings of the optimizer.
    """
    uses_accumulator = engine.zero_optimization_stage() and engine.optimizer.use_grad_accum_attribute
    return "grad_accum" if uses_accumulator else "grad"


# Sliced models


def register_expert_groups(name: str, expert_group: Any, expert_data_group: Any) -> None:
    """Register the process groups of experts under the name by which ZeRO's optimizers look them up.

    DeepSpeed creates such groups itself and offers no way to pass existing ones.
    """
    from deepspeed.utils import groups

    groups._EXPERT_PARALLEL_GROUP[name] = expert_group
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = expert_data_group


def deepspeed_moe_class(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Return a subclass of `kind` that DeepSpeed accepts as one of its MoE layers, with nothing of their behaviour.

    The engine tests `isinstance(module, MoE)` to find out that ZeRO 1 and 2 average the gradients of experts over fewer ranks.
    `num_local_experts` is 0: the engine saves one file for each local expert, but the optimizer's files already hold them.
    `set_deepspeed_parallelism` does nothing: the groups exist already.

    kind: its `__init__` must call torch.nn.Module.__init__ instead of super().__init__(), because MoE's builds experts of its own
    """
    from deepspeed.moe.layer import MoE

    members = {"num_local_experts": 0, "set_deepspeed_parallelism": lambda *_arguments, **_options: None}
    return new_class(f"{kind.__name__}MoE", (kind, MoE), exec_body=lambda namespace: namespace.update(members))


def mark_as_autoep_expert(parameter: Any, group_name: str, expert_data_group: Any) -> None:
    """Mark a parameter as an expert of DeepSpeed's AutoEP, so that ZeRO 3 partitions it over `expert_data_group`.

    ZeRO 3 refuses modules of the class MoE. It recognises experts only by the attributes that AutoEP
    (module_inject/auto_ep_layer.py) sets. AutoEP places experts on the same ranks as longhaul does.
    """
    parameter.ds_zero_placement_family = "autoep_expert"
    parameter.ds_zero_partition_group_name = group_name
    parameter.ds_zero_partition_process_group = expert_data_group


def zero3_partitioner(
    ds_config: dict[str, Any], data_group: Any
) -> tuple[torch.dtype, Callable[[torch.nn.Parameter], None]]:
    """Return the dtype of ZeRO 3's weights, and a function that partitions one parameter over its data-parallel ranks.

    The public `deepspeed.zero.Init` converts parameters only while a module is constructed, or all parameters of a finished
    module. longhaul allocates and partitions one parameter at a time, so that no rank needs memory for its whole slice.
    """
    import deepspeed

    init = deepspeed.zero.Init(module=torch.nn.Module(), data_parallel_group=data_group, config_dict_or_path=ds_config)
    return init.dtype, lambda parameter: init._convert_to_zero_parameters([parameter])


def unpartitioned_shape(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a tensor without ZeRO 3, which empties partitioned tensors and keeps their shape in `ds_shape`."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))
