"""Optimizer states on a disk and in CPU memory: a stage that was cut off ends with the bits of one that was not."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import pytest

from longhaul.config.architectures import Model
from longhaul.config.model_size import geometry
from longhaul.runtime.swap_folders import swap_root
from tests.parity.parity_cases import MODELS
from tests.parity.parity_table import make_data
from tests.recovery.test_resharding import assert_same_state
from tests.recovery.trained_stages import HALF, RUN, STEPS, Leg, train

PARAMETERS = geometry(Model.model_validate(MODELS["llama"]).config_dict()).total
DISK = {"zero": {"stage": 3, "offload_optimizer": "nvme"}}
MEMORY = {"zero": {"stage": 3, "offload_optimizer": "cpu"}}
LEFT_OUT = [HALF, HALF + 1]
ROLLS_BACK = {"bad_steps": {"policy": "roll_back"}}
STOPPED = {"stop_after": HALF}
SAVED_AGAIN = {"save_again": True, **STOPPED}

# Name -> the leg it goes on from, its stage, and what befalls it.
LEGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "disk whole": ("", {**DISK, "skip_batches": LEFT_OUT}, {}),
    "disk half": ("", DISK, STOPPED),
    "disk on": ("disk half", {**DISK, **ROLLS_BACK}, {"poison": {HALF + 1: float("nan")}}),
    "disk to ZeRO 1": ("disk half", {}, SAVED_AGAIN),
    "memory whole": ("", MEMORY, {}),
    "memory half": ("", MEMORY, STOPPED),
    "memory on": ("memory half", MEMORY, {}),
    "memory to disk": ("memory half", DISK, SAVED_AGAIN),
    "memory to the device": ("memory half", {"zero": {"stage": 3}}, SAVED_AGAIN),
    "device half": ("", {"zero": {"stage": 2}}, STOPPED),
    "device to memory": ("device half", {"zero": {"stage": 2, "offload_optimizer": "cpu"}}, SAVED_AGAIN),
}


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory, offload_ops: None) -> dict[str, Leg]:
    """Undisturbed runs, stopped halves, and what became of these."""
    folder = tmp_path_factory.mktemp("swapped")
    found = {}
    for name, (half, stage, befalls) in LEGS.items():
        takes_over = {"goes_on_from": str(folder / half)} if half else {}
        found[name] = Leg(folder / name, 2, stage=stage, befalls={**befalls, **takes_over})
    train(make_data(folder / "shared"), *found.values())
    return found


@pytest.mark.timeout(900)
def test_after_a_resume_and_a_roll_back_the_bits_are_those_of_a_calm_run(legs: dict[str, Leg]):
    calm, disturbed = legs["disk whole"], legs["disk on"]
    assert calm.ended == disturbed.ended == "finished"
    assert [row["batches"] for row in disturbed.events("rolled_back")] == [LEFT_OUT]
    assert disturbed.losses() == calm.losses() and len(calm.losses()) == STEPS
    assert disturbed.masters() == calm.masters()


def test_with_the_optimizer_in_memory_a_resume_changes_no_bit(legs: dict[str, Leg]):
    """DeepSpeed's CPU Adam rounds its bias corrections otherwise when it begins at a later step."""
    assert legs["memory on"].losses() == legs["memory whole"].losses()
    assert legs["memory on"].masters() == legs["memory whole"].masters()


@pytest.mark.parametrize("move", [name for name in LEGS if " to " in name])
def test_masters_moments_and_count_are_those_that_were_saved(legs: dict[str, Leg], move: str):
    assert_same_state(legs[LEGS[move][0]], legs[move])


def test_states_are_really_swapped_and_nothing_is_left_of_them(legs: dict[str, Leg]):
    """Masters and two moments of every group but the one of norms and biases, in whole blocks; a rank has several."""
    for rank in (0, 1):
        files = json.loads((legs["disk half"].folder / f"swapped-{rank}.json").read_text())
        states = {name: size for name, size in files.items() if "gradient" not in name}
        masters = {name: size for name, size in states.items() if not name.startswith("exp_avg")}
        assert len(masters) > 1 and len(states) == 3 * len(masters)
        assert sum(masters.values()) > 0.9 * 4 * PARAMETERS / 2 and all(size % 1024 == 0 for size in states.values())
    assert not list(swap_root(tempfile.gettempdir()).glob(f"{RUN}-*"))
