"""ZeRO 3's step in one pass: it trains as DeepSpeed's step does, which still takes several passes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.zero import stage3

from longhaul.compat import deepspeed_optimizer_step
from longhaul.compat.deepspeed_optimizer_step import can_update_in_one_pass
from tests.support import zero3_update_worker
from tests.support.launch_ranks import launch_worker


def test_zero_3_trains_as_with_the_step_of_deepspeed():
    done = launch_worker(Path(zero3_update_worker.__file__), 2, timeout_s=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    (difference,) = re.findall(r"EQUAL (\S+) ", done.stdout)
    assert float(difference) < 1e-4 and "UNCHANGED" in done.stdout, done.stdout


def test_the_step_of_zero_3_still_takes_several_passes_and_waits_for_the_norm():
    source = inspect.getsource(stage3)
    for line in (
        "self.flatten(self.averaged_gradients[sub_group_id]).to(",
        "if is_invalid_grad_norm(scaled_global_grad_norm):",
        "get_norm_dtype()).norm(norm_type)",
        ".grad.mul_(1. / combined_scale)",
    ):
        assert line in source, line


def test_gradients_that_follow_each_other_are_not_copied():
    buffer = torch.arange(8.0)
    optimizer: Any = SimpleNamespace(grad_partitions_flat_buffer=buffer, flatten=torch.cat)
    following = deepspeed_optimizer_step._flat_gradient(optimizer, [buffer[2:4], buffer[4:7]])
    assert following.tolist() == [2, 3, 4, 5, 6] and following.data_ptr() == buffer[2:].data_ptr()
    with_frozen = deepspeed_optimizer_step._flat_gradient(optimizer, [buffer[2:4], torch.zeros(2), buffer[4:5]])
    assert with_frozen.tolist() == [2, 3, 0, 0, 4]


def test_only_states_on_the_device_are_updated_in_one_pass():
    on_device = {"offload_optimizer": False, "offload_param": False, "use_muon": False, "dtype": torch.bfloat16}
    for changed, expected in (({}, True), ({"offload_optimizer": True}, False), ({"offload_param": True}, False),
                              ({"dtype": torch.float32}, False), ({"use_muon": True}, False)):  # fmt: skip
        engine = SimpleNamespace(optimizer=SimpleNamespace(**on_device), zero_optimization_stage=lambda: 3)
        vars(engine.optimizer).update(changed)
        assert can_update_in_one_pass(engine) is expected
