"""Weights on a disk: a stage trains, is cut off and goes on with the bits of one that has them in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest

from longhaul.memory import SWAP_PARAM_BUFFERS
from parity_table import make_data
from stages import Leg, train
from test_elastic import assert_same_state

# DeepSpeed swaps a rank's part of a tensor from 1 MiB on: of two ranks, a million elements in bf16.
WIDE = {
    "llama": {
        "vocab_size": 2048,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }
}
LARGE_TENSORS = 2 + 3 * 3  # embedding, head, and three of each layer's MLP: more than there are buffers
assert LARGE_TENSORS > SWAP_PARAM_BUFFERS
# Tensors of this size are slow on a CPU; in bf16, for which many have no instructions, even more so.
STEPS, HALF, STEPS_IN_BF16 = 6, 3, 2
SHORT = {"steps": STEPS, "global_batch": 2, "micro_batch": 1}
BF16 = {"precision": "bf16", "steps": STEPS_IN_BF16}
MEMORY = {"zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}}
DISK = {"zero": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "nvme"}}
STATES_ON_DISK = {"zero": {"stage": 3, "offload_optimizer": "nvme", "offload_param": "cpu"}}
ALL_ON_DISK = {"zero": {"stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme"}}
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
        found[name] = Leg(folder / name, 2, stage={**SHORT, **stage}, befalls={**befalls, **takes_over}, model=WIDE)
    train(make_data(folder / "shared"), *found.values())
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("memory", "disk", "steps"),
    [
        ("memory whole", "disk whole", STEPS),
        ("states whole", "all whole", STEPS),
        ("bf16 memory", "bf16 disk", STEPS_IN_BF16),
    ],
)
def test_weights_on_a_disk_train_to_the_bits_of_those_in_memory(
    legs: dict[str, Leg], memory: str, disk: str, steps: int
):
    """Beside an optimizer in the same place: one on a disk has another sub_group_size, and with it sums round otherwise."""
    assert legs[memory].ended == legs[disk].ended == "finished" and len(legs[disk].losses()) == steps
    assert legs[disk].losses() == legs[memory].losses()
    assert legs[disk].masters() == legs[memory].masters()


def test_a_resume_changes_no_bit(legs: dict[str, Leg]):
    assert legs["all on"].losses() == legs["all whole"].losses()
    assert legs["all on"].masters() == legs["all whole"].masters()


def test_masters_moments_and_count_are_those_that_were_saved(legs: dict[str, Leg]):
    assert_same_state(legs["all half"], legs["all to ZeRO 1"], HALF, more_than=20)


def test_every_large_tensor_is_on_the_disk(legs: dict[str, Leg]):
    """In bf16 each is half as large, and a rank's part of it 1 MiB."""
    for rank in (0, 1):
        files = json.loads((legs["all half"].folder / f"swapped-{rank}.json").read_text())
        weights = [size for name, size in files.items() if "_param" in name]
        assert len(weights) == LARGE_TENSORS and min(weights) >= 2 << 20
