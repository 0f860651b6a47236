"""Weights on a disk: a stage trains, is cut off and goes on with the bits of one that has them in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from deepspeed.runtime.swap_tensor.utils import MIN_AIO_BYTES

from longhaul.planning.gpu_memory import SWAP_PARAM_BUFFERS, SWAPPED_BYTES
from tests.parity.parity_cases import MODELS
from tests.parity.parity_table import make_data
from tests.parity.parity_worker import TWIN_SWAPPED_BYTES
from tests.recovery.test_resharding import assert_same_state
from tests.recovery.trained_stages import Leg, train

LARGE_TENSORS = 2 + 7 * MODELS["llama"]["llama"]["num_hidden_layers"]  # embedding, head, and each layer's matrices
assert LARGE_TENSORS > SWAP_PARAM_BUFFERS
STEPS, HALF = 6, 3
SHORT = {  # every pass reads every weight from the disk
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
}  # of a twin all would be small enough to stay
DISK = {"zero": {"stage": 3, "offload_optimizer": "cpu", **SWAPPED}}
STATES_ON_DISK = {"zero": {"stage": 3, "offload_optimizer": "nvme", "offload_param": "cpu"}}
ALL_ON_DISK = {"zero": {"stage": 3, "offload_optimizer": "nvme", **SWAPPED}}
STOPPED = {"stop_after": HALF}
SAVED_AGAIN = {"save_again": True, **STOPPED}

# Name -> the leg it goes on from, its stage, and what befalls it.
LEGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "memory whole": ("", MEMORY, {}),
    "states whole": ("", STATES_ON_DISK, {}),
    "disk whole": ("", DISK, {}),
    "all whole": ("", ALL_ON_DISK, {}),
    "all half": ("", ALL_ON_DISK, STOPPED),
    "all on": ("all half", ALL_ON_DISK, {}),
    "all to ZeRO 1": ("all half", {}, SAVED_AGAIN),
    "bf16 memory": ("", {**MEMORY, **BF16}, {}),
    "bf16 disk": ("", {**DISK, **BF16}, {}),
}


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory, offload_ops: None) -> dict[str, Leg]:
    """Undisturbed runs, stopped halves, and what became of these."""
    folder = tmp_path_factory.mktemp("swapped_weights")
    found = {}
    for name, (half, stage, befalls) in LEGS.items():
        takes_over = {"goes_on_from": str(folder / half)} if half else {}
        found[name] = Leg(folder / name, 2, stage={**SHORT, **stage}, befalls={**befalls, **takes_over})
    train(make_data(folder / "shared"), *found.values())
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("memory", "disk"),
    [("memory whole", "disk whole"), ("states whole", "all whole"), ("bf16 memory", "bf16 disk")],
)
def test_weights_on_a_disk_train_to_the_bits_of_those_in_memory(legs: dict[str, Leg], memory: str, disk: str):
    """Beside an optimizer in the same place: one on a disk has another sub_group_size, and with it sums round otherwise."""
    assert legs[memory].ended == legs[disk].ended == "finished" and len(legs[disk].losses()) == STEPS
    assert legs[disk].losses() == legs[memory].losses()
    assert legs[disk].masters() == legs[memory].masters()


def test_a_resume_changes_no_bit(legs: dict[str, Leg]):
    assert legs["all on"].losses() == legs["all whole"].losses()
    assert legs["all on"].masters() == legs["all whole"].masters()


def test_masters_moments_and_count_are_those_that_were_saved(legs: dict[str, Leg]):
    assert_same_state(legs["all half"], legs["all to ZeRO 1"], HALF)


def test_every_large_tensor_is_on_the_disk(legs: dict[str, Leg]):
    for rank in (0, 1):
        files = json.loads((legs["all half"].folder / f"swapped-{rank}.json").read_text())
        weights = [size for name, size in files.items() if "_param" in name]
        assert len(weights) == LARGE_TENSORS and min(weights) == TWIN_SWAPPED_BYTES


def test_what_the_plan_takes_for_swapped_is_what_deepspeed_swaps():
    assert SWAPPED_BYTES == MIN_AIO_BYTES
