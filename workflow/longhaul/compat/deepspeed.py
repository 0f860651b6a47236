"""Patches of DeepSpeed: gradient norm and clipping, skipped updates, loss scaler, files of checkpoints, swapped states, experts,
ops. Written for DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import new_class
from typing import Any

import torch

Engine = Any
"""DeepSpeed's engine. DeepSpeed declares no types, and adds methods and attributes to its engine at run time."""

# Checkpoints


def save_without_recovery_script(engine: Engine) -> None:
    """Stop `engine.save_checkpoint` from copying zero_to_fp32.py and zero_to_torch.py beside the checkpoint.

    No setting turns that off. The scripts would lie in the folder of all checkpoints and in no manifest, and
    `longhaul export` reads the checkpoints itself.
    """
    engine._copy_recovery_script = lambda _folder: None


@contextmanager
def files_read_with(engine: Engine, load: Callable[..., Any]) -> Iterator[None]:
    """Let `engine.load_checkpoint` read every file through `load(path, classes, map_location)` for the length of the block.

    DeepSpeed's own checkpoint engines call torch.load with weights_only=False: a file could run any code. No setting changes
    that. `classes` are those whose objects DeepSpeed saves beside tensors and plain data.
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
    """
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def has_wrapped_optimizer(engine: Engine) -> bool:
    """Return whether a ZeRO or 16-bit optimizer wraps the one that updates the master weights."""
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

    `engine.get_global_grad_norm()` returns the norm of the previous step until `engine.step` is over.
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
    norm of experts that ranks divide is left to DeepSpeed: it is averaged over other ranks.
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
    """Let ZeRO 3 gather all weights of a module of these classes at once, in the place of one hook for each inner module."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, layer_classes)


def count_sliced_experts_in_gradient_norm(engine: Engine) -> None:
    """Let ZeRO 3 sum the gradient norm of experts over the tensor ranks, as it does for every parameter that they slice.

    `_grad_norm_counts_every_rank` assumes that experts with a group name come from DeepSpeed's AutoEP, which tensor ranks do
    not slice. longhaul's experts are sliced, and marked as such.
    """
    engine.optimizer._grad_norm_counts_every_rank = lambda *_arguments: False


def average_gradients_with(engine: Engine, average: Callable[[], None]) -> None:
    """Call `average` in the place of DeepSpeed's own averaging of gradients over the data ranks. ZeRO 0 and 1.

    The engine has no communication hook as DistributedDataParallel has one. At ZeRO 1 the optimizer still distributes the
    averaged gradients to the partitions, so its own all-reduce becomes a mere flattening.
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
    """Return the name of the parameters' attribute in which DeepSpeed accumulates gradients at ZeRO 0 and 1."""
    uses_accumulator = engine.zero_optimization_stage() and engine.optimizer.use_grad_accum_attribute
    return "grad_accum" if uses_accumulator else "grad"


# Master weights and optimizer states


@dataclass(frozen=True)
class OwnedRange:
    """The elements of a parameter that this rank's optimizer updates.

    flat:   the optimizer's own tensor of master weights, a key of its `state`
    offset: where the elements begin in `flat`
    start:  where they begin in the flattened parameter
    numel:  their number; 0 where this rank owns none
    """

    flat: torch.Tensor
    offset: int
    start: int
    numel: int


def owned_range(engine: Engine, parameter: Any) -> OwnedRange | None:
    """Return which elements of the parameter this rank's optimizer owns; None where it owns none.

    DeepSpeed's own accessors (safe_get_full_fp32_param, safe_set_local_fp32_param) copy whole tensors and know no offsets.
    """
    optimizer, zero_stage = engine.optimizer, engine.zero_optimization_stage()
    if zero_stage == 0:  # the parameter is its own master weight
        return OwnedRange(parameter, 0, 0, parameter.numel())
    if zero_stage < 3:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
        return OwnedRange(flat, target.start, source.start, source.numel)
    group, offset, partition_numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = optimizer._get_param_partition_rank(parameter) * partition_numel
    numel = max(0, min(partition_numel, parameter.ds_numel - start))  # the last ranks' partitions are padded
    return OwnedRange(optimizer.fp32_partitioned_groups_flat[group], offset, start, numel)


def update_weights_from_masters(engine: Engine) -> None:
    """Copy the master weights into the weights that the model computes with. DeepSpeed does so only inside its own load."""
    optimizer, zero_stage = engine.optimizer, engine.zero_optimization_stage()
    if zero_stage in (1, 2):
        optimizer.update_lp_params()
    if zero_stage == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()


def replay_cpu_adam_steps(engine: Engine) -> None:
    """Give DeepSpeed's CPU Adam, after a load, the bias corrections of a run that was never interrupted.

    The op multiplies the powers of the betas from step to step, in fp32, and saves none of them. After a load it takes them
    from pow(), which rounds differently. Here it counts to the loaded step again, over empty tensors.
    """
    adam = inner_optimizer(engine)
    op = getattr(adam, "ds_opt_adam", None)
    if op is None:
        return
    group, empty = adam.param_groups[0], torch.empty(0)
    hyperparameters = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    op.destroy_adam(adam.opt_id)
    op.create_adam(adam.opt_id, *hyperparameters, adam.adam_w_mode, False)
    for step in range(1, max((state["step"] for state in adam.state.values()), default=0) + 1):
        op.adam_update(adam.opt_id, step, *hyperparameters, group["bias_correction"], empty, empty, empty, empty)


_LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scaler_state(engine: Engine) -> dict[str, float] | None:
    """Return the state of fp16's dynamic loss scaler; None where there is none. It depends on no parallel layout."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not hasattr(scaler, "last_overflow_iter"):
        return None
    return {name: getattr(scaler, name) for name in _LOSS_SCALER_FIELDS}


def restore_loss_scaler(engine: Engine, saved: dict[str, float] | None) -> None:
    """Set the dynamic loss scaler to a state that `loss_scaler_state` returned; None changes nothing."""
    for name, value in (saved or {}).items():
        setattr(engine.optimizer.loss_scaler, name, value)


# Optimizer states in files (ZeRO-Infinity)


@contextmanager
def mapped_optimizer_states(engine: Engine, writable: bool = False) -> Iterator[None]:
    """Map the files of swapped master weights and moments into their tensors for the length of the block.

    DeepSpeed keeps the states of each large sub-group in one file per tensor and reads them only while it updates that
    sub-group. Its own checkpoints copy those files, and lose the states that were too small to be swapped and Adam's number of
    steps. With mapped files, everything that saves, loads or gathers states in memory works, and the checkpoint has the usual
    form. Pages are read and written on demand, so the states never fill the memory.

    writable: what the block writes to the states goes to the files. Without swapped states the block runs unchanged.
    """
    optimizer = engine.optimizer
    if not getattr(optimizer, "swap_optimizer", False):
        yield
        return
    infos = optimizer.optimizer_swapper.swap_params_info.values()
    for info in infos:
        for state in info.tensors:
            _map_file(state, info.numel(), writable)
    optimizer.swap_optimizer = False
    try:
        yield
    finally:
        optimizer.swap_optimizer = True
        for info in infos:
            info.release_memory()


def clear_adam_state(engine: Engine) -> None:
    """Remove moments and step counts: the optimizer holds only master weights, as after its construction."""
    if swapper := getattr(engine.optimizer, "optimizer_swapper", None):
        swapper.purge_state()
    adam = engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer
    adam.state.clear()


def zero_moment(swapper: Any, flat: Any, name: str) -> torch.Tensor:
    """Return zeros of the shape of the optimizer's tensor `flat`; in a new file if `swapper` keeps `flat` in one, else in memory.

    swapper: DeepSpeed's OptimizerSwapper, or None. The tensor is mapped until the enclosing `mapped_optimizer_states` ends; then
    the file belongs to DeepSpeed.
    """
    info = swapper.swap_params_info.get(flat.ds_id) if swapper else None
    if info is None:
        return torch.zeros_like(flat)
    moment: Any = torch.empty(0, dtype=flat.dtype)
    moment.ds_id = f"{name}-{flat.ds_id}"  # the name that OptimizerSwapper._get_state_tensors gives
    info.add_state_tensors([moment])
    state = info.tensors[-1]
    with Path(state.swap_path).open("wb") as file:
        # The swapper reads and writes whole blocks.
        file.truncate(swapper._io_aligned_numel(info.numel()) * flat.element_size())
    _map_file(state, info.numel(), writable=True)
    return moment


def _map_file(state: Any, numel: int, writable: bool) -> None:
    tensor = state.compute_tensor
    tensor.data = torch.from_file(state.swap_path, shared=writable, size=numel, dtype=tensor.dtype)


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


# Compiled ops


def op_builder(name: str) -> Any:
    """Return DeepSpeed's builder of an op, such as "cpu_adam". DeepSpeed documents no way to compile one op in advance."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    return ALL_OPS[name]


def disable_shm_comm() -> None:
    """Stop `deepspeed.init_distributed` from compiling shared-memory collectives on a CPU; gloo does their work.

    No setting turns that off. The table of compatible ops is the only thing that DeepSpeed asks before it compiles.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def compile_without_debug_information() -> None:
    """Remove -g from the compiler flags of all ops. Debug information costs a third of the compile time and 90 % of the file.

    No setting does that. Every process that loads ops must call this: with other flags, torch compiles them again.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder

    OpBuilder.strip_empty_entries = lambda self, args: [flag for flag in args if flag not in ("", "-g")]
