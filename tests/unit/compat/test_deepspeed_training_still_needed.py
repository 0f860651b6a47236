"""The parts of compat/deepspeed.py that train and save are still needed. A failing test means that DeepSpeed has changed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerStateSwapInfo, OptimizerSwapper, SwapTensorContext
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import mixed_precision_linkage, tensor_fragment

from longhaul.compat import deepspeed as compat
from longhaul.compat import deepspeed_optimizer_states as states
from longhaul.compat.deepspeed_optimizer_step import update_in_one_pass
from tests.support import one_rank_worker
from tests.support.launch_ranks import launch_worker


def source_of(*functions: Any) -> str:
    return "".join(inspect.getsource(function) for function in functions)


def test_saving_always_copies_the_recovery_script():
    source = inspect.getsource(DeepSpeedEngine._save_zero_checkpoint)
    assert "if self.global_rank == 0:\n            self._copy_recovery_script(save_path)" in source
    engine = SimpleNamespace()
    compat.save_without_recovery_script(engine)
    engine._copy_recovery_script("folder")


def test_the_optimizer_step_has_no_hook_between_norm_and_update():
    """Both optimizers compute the norm and update the weights inside one method."""
    for kind in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        _, _, step = source_of(kind).partition("    def step(self, closure=None")
        step, _, _ = step.partition("\n    def ")
        assert step.index("_global_grad_norm = ") < step.index("unscale_and_clip_grads(")
    inner = SimpleNamespace(step=lambda: "updated")
    engine = SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner, _global_grad_norm=2.5))
    compat.wrap_optimizer_step(engine, lambda step: lambda: f"{step()} through the wrapper")
    assert inner.step() == "updated through the wrapper"
    assert compat.has_wrapped_optimizer(engine) and compat.gradient_norm_before_update(engine) == 2.5
    assert compat.inner_optimizer(SimpleNamespace(optimizer=inner)) is inner


def test_the_outer_optimizer_has_no_hook_before_its_update():
    for kind in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        assert not hasattr(kind, "register_step_pre_hook")
    assert inspect.getsource(DeepSpeedEngine).count("self.optimizer.step(") == 1
    calls: list[Any] = []
    engine = SimpleNamespace(optimizer=SimpleNamespace(step=lambda closure=None: calls.append(closure)))
    compat.call_before_update(engine, lambda: calls.append("before"))
    engine.optimizer.step("closure")
    assert calls == ["before", "closure"]


def test_clipping_and_the_norm_of_zero_1_and_2_wait_for_the_cpu():
    clipping = inspect.getsource(DeepSpeedZeroOptimizer.unscale_and_clip_grads)
    assert "if self.clip_grad == 0.0 and self.loss_scale == 1.0:\n            return" in clipping
    assert "if is_invalid_grad_norm(clip_norm):" in clipping
    norm = inspect.getsource(DeepSpeedZeroOptimizer.get_grad_norm_direct)
    assert "g.data.to(get_norm_dtype())" in norm and "mask_nan_or_inf_with_val_inplace(total_norm" in norm
    engine = SimpleNamespace(optimizer=SimpleNamespace(clip_grad=2.0))
    assert compat.take_over_clipping(engine) == 2.0 and engine.optimizer.clip_grad == 0.0


def test_the_norm_in_fp32_is_that_of_the_gradients_without_padding():
    padding = torch.full((4,), 7.0)
    padding._zero_padding = True  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = SimpleNamespace(
        has_moe_layers=False, cpu_offload=False, device="cpu", dp_process_group=None, model_parallel_rank=0,
        params_in_partition=[[torch.zeros(2), torch.zeros(1)], [torch.zeros(1)]],
        averaged_gradients={0: [torch.tensor([3.0, 4.0]).bfloat16(), torch.tensor([12.0]), padding], 1: [torch.zeros(1)]},
        _model_parallel_all_reduce=lambda tensor, op: None,
    )  # fmt: skip
    compat.measure_norm_in_fp32(SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 1))
    with mock.patch("torch.distributed.all_reduce"):
        assert optimizer.scaled_global_norm().item() == 13.0


def test_the_public_gradient_norm_is_set_only_after_the_step():
    source = inspect.getsource(DeepSpeedEngine._take_model_step)
    assert source.index("self.optimizer.step(") < source.index("_global_grad_norm = ")


def test_zero_3_counts_sliced_experts_as_autoep_experts():
    source = inspect.getsource(DeepSpeedZeroOptimizer_Stage3._grad_norm_counts_every_rank)
    assert "if self._autoep_expert_parallel_group(params) is not None:\n            return True" in source
    engine = SimpleNamespace(optimizer=SimpleNamespace())
    compat.count_sliced_experts_in_gradient_norm(engine)
    assert engine.optimizer._grad_norm_counts_every_rank([], None) is False


def test_the_engine_has_no_communication_hook():
    assert not [name for name in dir(DeepSpeedEngine) if "comm_hook" in name]
    assert "self.buffered_allreduce_fallback(" in source_of(DeepSpeedEngine)
    for name in ("reduce_gradients", "allreduce_bucket", "flatten"):
        assert name in source_of(DeepSpeedZeroOptimizer)
    assert "self.use_grad_accum_attribute = True" in inspect.getsource(DeepSpeedZeroOptimizer.__init__)


def test_gradients_of_one_rank_are_still_copied_to_be_averaged():
    done = launch_worker(Path(one_rank_worker.__file__), 1, timeout_s=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found = re.findall(r"^(\d \w+) (EQUAL|DIFFERENT) (\d+) (\d+)$", done.stdout, flags=re.MULTILINE)
    assert [name for name, *_ in found] == ["1 bf16", "1 fp32", "2 bf16", "2 fp32"]
    for name, bits, copies, copies_without in found:
        assert bits == "EQUAL" and int(copies_without) < int(copies), name


def test_gradients_are_averaged_if_one_group_has_other_ranks():
    optimizer = SimpleNamespace(dp_process_group=1, real_dp_process_group=[1, 2], buffered_reduce_fallback="usual")
    engine: Any = SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 1)
    with mock.patch("torch.distributed.get_world_size", side_effect=lambda ranks: ranks):
        compat.skip_averaging_over_one_rank(engine)
        assert optimizer.buffered_reduce_fallback == "usual"
        optimizer.real_dp_process_group = [1, 1]
        compat.skip_averaging_over_one_rank(engine)
    assert optimizer.buffered_reduce_fallback("gradients") is None


def test_no_public_function_says_which_elements_a_rank_owns():
    assert not [name for name in vars(tensor_fragment) if "offset" in name or "owned" in name]
    zero_1_and_2, zero_3 = source_of(DeepSpeedZeroOptimizer), source_of(DeepSpeedZeroOptimizer_Stage3)
    assert "._hp_mapping = " in source_of(mixed_precision_linkage) and "single_partition_of_fp32_groups" in zero_1_and_2
    assert "self.grad_position[param_id] = [int(i), int(current_offset), int(num_elements)]" in zero_3
    for name in (
        "_get_param_partition_rank",
        "_reassign_or_swap_out_partitioned_parameters",
        "checkpoint_event_epilogue",
    ):
        assert hasattr(DeepSpeedZeroOptimizer_Stage3, name)
    assert hasattr(DeepSpeedZeroOptimizer, "update_lp_params")


def test_cpu_adam_multiplies_powers_of_the_betas_and_restarts_them_with_pow():
    header = Path(deepspeed.__file__).parent / "ops/csrc/includes/cpu_adam.h"
    source = header.read_text()
    assert "_betta1_t *= _betta1;" in source and "_betta1_t = std::pow(_betta1, step);" in source
    calls: list[tuple[Any, ...]] = []
    op = SimpleNamespace(
        destroy_adam=lambda *arguments: calls.append(("destroy",)),
        create_adam=lambda *arguments: calls.append(("create",)),
        adam_update=lambda _id, step, *arguments: calls.append(("update", step)),
    )
    group = {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "bias_correction": True}
    adam = SimpleNamespace(ds_opt_adam=op, param_groups=[group], state={"p": {"step": 3}}, opt_id=0, adam_w_mode=True)
    states.replay_cpu_adam_steps(SimpleNamespace(optimizer=adam))
    assert calls == [("destroy",), ("create",), ("update", 1), ("update", 2), ("update", 3)]


def test_the_loss_scaler_has_no_state_dict():
    scaler = DynamicLossScaler(2.0**16, scale_window=1000, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False)
    assert not hasattr(scaler, "state_dict")
    engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
    state = states.loss_scaler_state(engine)
    assert state == {"cur_scale": 2.0**16, "cur_iter": 0, "last_overflow_iter": -1, "cur_hysteresis": 2}
    states.restore_loss_scaler(engine, state | {"cur_scale": 8.0})
    assert scaler.cur_scale == 8.0


def test_swapped_states_are_tensors_with_a_file_each(tmp_path: Path):
    """The names that mapped_optimizer_states and zero_moment use; DeepSpeed documents none of them."""
    parameter: Any = torch.zeros(10)
    parameter.ds_id = "7"
    info = OptimizerStateSwapInfo(parameter, 10, str(tmp_path), None)
    swapper = SimpleNamespace(swap_params_info={"7": info}, _io_aligned_numel=lambda numel: 16)
    assert "self.swap_params_info" in source_of(OptimizerSwapper) and hasattr(OptimizerSwapper, "_io_aligned_numel")
    assert "value.ds_id = state_name + '-' + parameter.ds_id" in inspect.getsource(OptimizerSwapper._get_state_tensors)
    moment = states.zero_moment(swapper, parameter, "exp_avg")
    (_, state) = info.tensors
    assert isinstance(state, SwapTensorContext) and state.compute_tensor is moment and info.has_state_tensors
    assert Path(state.swap_path).stat().st_size == 16 * 4 and torch.equal(moment, torch.zeros(10))
    moment.fill_(2.0)
    Path(info.tensors[0].swap_path).write_bytes(torch.arange(16.0).numpy().tobytes())
    optimizer = SimpleNamespace(swap_optimizer=True, optimizer_swapper=swapper)
    with states.mapped_optimizer_states(SimpleNamespace(optimizer=optimizer)):
        assert not optimizer.swap_optimizer
        assert torch.equal(parameter, torch.arange(10.0)) and torch.equal(moment, torch.full((10,), 2.0))
    assert optimizer.swap_optimizer and parameter.numel() == 0


def test_the_swapper_forgets_moments_in_one_call():
    assert "swap_info.tensors = [swap_info.tensors[0]]" in inspect.getsource(OptimizerSwapper.purge_state)


def test_the_step_of_zero_1_and_2_converts_gradients_and_weights_in_passes_of_their_own():
    step = inspect.getsource(DeepSpeedZeroOptimizer.step)
    assert "flat_grad_partition.to(self.single_partition_of_fp32_groups[i].dtype)" in step
    assert "bit16_partitions[partition_id].data.copy_(fp32_partition.data)" in step


def test_an_update_in_one_pass_gets_flat_partitions_and_frees_gradients():
    master, weights = torch.ones(4), torch.zeros(4)
    freed: list[Any] = []
    optimizer: Any = SimpleNamespace(
        bit16_groups=[None], bit16_groups_flat=[weights], parallel_partitioned_bit16_groups=[[weights]],
        single_partition_of_fp32_groups=[master], real_dp_process_group=[None], partition_size=[4],
        params_not_in_partition=[["other"]], params_in_partition=[["own"]],
        averaged_gradients={0: [torch.full((3,), 2.0)]}, all_grad_tensors={0: "kept"},
        nccl_start_alignment_factor=2, allgather_bucket_size=8, micro_step_id=3,
        scaled_global_norm=lambda: torch.tensor(5.0), free_grad_in_param_list=freed.extend,
        _get_preflattened_grad_partition=lambda group: None, _release_preflattened_grad_buffers=lambda group: None,
        flatten_dense_tensors_aligned=lambda tensors, size: torch.nn.functional.pad(tensors[0], (0, size - 3)),
        _update_model_bit16_weights=freed.append,
    )  # fmt: skip

    def update(group: int, own: torch.Tensor, gradient: torch.Tensor, lower: torch.Tensor) -> None:
        assert own is master and optimizer._global_grad_norm == 5.0
        lower.copy_(own - gradient)

    with (
        mock.patch("torch.distributed.get_rank", return_value=0),
        mock.patch("torch.distributed.get_world_size", return_value=1),
        mock.patch("deepspeed.runtime.utils.all_gather_dp_groups"),
    ):
        update_in_one_pass(SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 1), update)
        optimizer.step()
    assert weights.tolist() == [-1, -1, -1, 1] and freed == ["other", "own", 0]
    assert optimizer.averaged_gradients == {0: None} and optimizer.all_grad_tensors == {0: None}
