"""Weights on a disk: a stage trains, is interrupted and resumes with the bits of one that has its weights in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from deepspeed.runtime.swap_tensor.utils import MIN_AIO_BYTES

from longhaul.planning.constants_shared_with_trainer import SWAP_MIN_BYTES, SWAP_PARAM_BUFFERS
from tests.parity.parity_cases import MODELS
from tests.parity.tokenizer_and_shards import write_shared_data
from tests.recovery.test_resharding import assert_same_state
from tests.recovery.trained_stages import TrainedStage, train
from tests.support.several_stages_in_one_process import MIN_SWAPPED_BYTES

pytestmark = pytest.mark.slow

LARGE_TENSORS = 2 + 7 * MODELS["llama"]["llama"]["num_hidden_layers"]  # embedding, head, and each layer's matrices
assert LARGE_TENSORS > SWAP_PARAM_BUFFERS
STEPS, HALF = 6, 3
SHORT = {  # few steps, as every pass reads every weight from the disk
    "steps": STEPS,
    "global_batch_size": 2,
    "micro_batch_size": 1,
    "validation": {"every_steps": STEPS, "max_samples": 2},
}
BF16 = {"precision": "bf16"}
MEMORY = {"zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}}
SWAPPED = {
    "offload_param": "nvme",
    "stage3_param_persistence_threshold": 0,
}  # by default all weights of a small model stay in memory
DISK = {"zero": {"stage": 3, "offload_optimizer": "cpu", **SWAPPED}}
STATES_ON_DISK = {"zero": {"stage": 3, "offload_optimizer": "nvme", "offload_param": "cpu"}}
ALL_ON_DISK = {"zero": {"stage": 3, "offload_optimizer": "nvme", **SWAPPED}}
# As with weights on a disk. ZeRO 3 adds up a gradient in another order where it gathers whole layers.
SINGLE_MODULES = {"gather_single_modules": True}
KILLED = {"kill_at_step": HALF}
SAVED_AFTER_LOAD = {"save_after_load": True, **KILLED}

# Name -> the stage whose checkpoints it resumes, the keys of its config, and its faults.
ATTEMPTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "memory uninterrupted": ("", MEMORY, SINGLE_MODULES),
    "states uninterrupted": ("", STATES_ON_DISK, SINGLE_MODULES),
    "disk uninterrupted": ("", DISK, {}),
    "all uninterrupted": ("", ALL_ON_DISK, {}),
    "all half": ("", ALL_ON_DISK, KILLED),
    "all resumed": ("all half", ALL_ON_DISK, {}),
    "all to ZeRO 1": ("all half", {}, SAVED_AFTER_LOAD),
    "bf16 memory": ("", {**MEMORY, **BF16}, SINGLE_MODULES),
    "bf16 disk": ("", {**DISK, **BF16}, {}),
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, offload_ops: None) -> dict[str, TrainedStage]:
    """Return uninterrupted runs, killed halves, and what resumed these."""
    folder = tmp_path_factory.mktemp("swapped_weights")
    found = {}
    for name, (half, keys, faults) in ATTEMPTS.items():
        resumes = {"copy_checkpoints_from": str(folder / half)} if half else {}
        found[name] = TrainedStage(folder / name, 2, stage={**SHORT, **keys}, faults={**faults, **resumes})
    train(write_shared_data(folder / "shared"), *found.values())
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("memory", "disk"),
    [
        ("memory uninterrupted", "disk uninterrupted"),
        ("states uninterrupted", "all uninterrupted"),
        ("bf16 memory", "bf16 disk"),
    ],
)
def test_weights_on_a_disk_get_the_bits_of_weights_in_memory(stages: dict[str, TrainedStage], memory: str, disk: str):
    """With an optimizer in the same place: one on a disk has another sub_group_size, so its sums are rounded differently."""
    assert stages[memory].ended == stages[disk].ended == "finished" and len(stages[disk].losses()) == STEPS
    assert stages[disk].losses() == stages[memory].losses()
    assert stages[disk].master_hashes() == stages[memory].master_hashes()


def test_a_resume_changes_no_bit(stages: dict[str, TrainedStage]):
    assert stages["all resumed"].losses() == stages["all uninterrupted"].losses()
    assert stages["all resumed"].master_hashes() == stages["all uninterrupted"].master_hashes()


def test_master_weights_moments_and_step_count_are_the_saved_ones(stages: dict[str, TrainedStage]):
    assert_same_state(stages["all half"], stages["all to ZeRO 1"], HALF)


def test_every_large_tensor_is_on_the_disk(stages: dict[str, TrainedStage]):
    for rank in (0, 1):
        files = json.loads((stages["all half"].folder / f"swapped-{rank}.json").read_text())
        weights = [size for name, size in files.items() if "_param" in name]
        assert len(weights) == LARGE_TENSORS and min(weights) == MIN_SWAPPED_BYTES


def test_the_plan_and_deepspeed_swap_the_same_tensors():
    assert SWAP_MIN_BYTES == MIN_AIO_BYTES
