"""Optimizer states on a disk and in CPU memory: an interrupted stage ends with the bits of an uninterrupted one."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import pytest

from longhaul.config.architectures import Model
from longhaul.config.model_size import model_size
from longhaul.runtime.swap_folders import swap_root
from tests.parity.parity_cases import MODELS
from tests.parity.tokenizer_and_shards import write_shared_data
from tests.recovery.test_resharding import assert_same_state
from tests.recovery.trained_stages import HALF, RUN, STEPS, TrainedStage, train

PARAMETERS = model_size(Model.model_validate(MODELS["llama"]).config_dict()).total
DISK = {"zero": {"stage": 3, "offload_optimizer": "nvme"}}
MEMORY = {"zero": {"stage": 3, "offload_optimizer": "cpu"}}
SKIPPED = [HALF, HALF + 1]
ROLLS_BACK = {"bad_steps": {"policy": "roll_back"}}
KILLED = {"kill_at_step": HALF}
SAVED_AFTER_LOAD = {"save_after_load": True, **KILLED}

# Name -> the stage whose checkpoints it resumes, the keys of its config, and its faults.
ATTEMPTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "disk uninterrupted": ("", {**DISK, "skip_batches": SKIPPED}, {}),
    "disk half": ("", DISK, KILLED),
    "disk resumed": ("disk half", {**DISK, **ROLLS_BACK}, {"poison": {HALF + 1: float("nan")}}),
    "disk to ZeRO 1": ("disk half", {}, SAVED_AFTER_LOAD),
    "memory uninterrupted": ("", MEMORY, {}),
    "memory half": ("", MEMORY, KILLED),
    "memory resumed": ("memory half", MEMORY, {}),
    "memory to disk": ("memory half", DISK, SAVED_AFTER_LOAD),
    "memory to the device": ("memory half", {"zero": {"stage": 3}}, SAVED_AFTER_LOAD),
    "device half": ("", {"zero": {"stage": 2}}, KILLED),
    "device to memory": ("device half", {"zero": {"stage": 2, "offload_optimizer": "cpu"}}, SAVED_AFTER_LOAD),
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, offload_ops: None) -> dict[str, TrainedStage]:
    """Return uninterrupted runs, killed halves, and what resumed these."""
    folder = tmp_path_factory.mktemp("swapped")
    found = {}
    for name, (half, keys, faults) in ATTEMPTS.items():
        resumes = {"copy_checkpoints_from": str(folder / half)} if half else {}
        found[name] = TrainedStage(folder / name, 2, stage=keys, faults={**faults, **resumes})
    train(write_shared_data(folder / "shared"), *found.values())
    return found


@pytest.mark.timeout(900)
def test_after_a_resume_and_a_roll_back_the_bits_are_those_of_an_undisturbed_run(stages: dict[str, TrainedStage]):
    undisturbed, disturbed = stages["disk uninterrupted"], stages["disk resumed"]
    assert undisturbed.ended == disturbed.ended == "finished"
    assert [row["batches"] for row in disturbed.events("rolled_back")] == [SKIPPED]
    assert disturbed.losses() == undisturbed.losses() and len(undisturbed.losses()) == STEPS
    assert disturbed.master_hashes() == undisturbed.master_hashes()


def test_with_the_optimizer_in_memory_a_resume_changes_no_bit(stages: dict[str, TrainedStage]):
    """DeepSpeed's CPU Adam rounds its bias corrections differently when it begins at a later step."""
    assert stages["memory resumed"].losses() == stages["memory uninterrupted"].losses()
    assert stages["memory resumed"].master_hashes() == stages["memory uninterrupted"].master_hashes()


@pytest.mark.parametrize("change", [name for name in ATTEMPTS if " to " in name])
def test_master_weights_moments_and_step_count_are_the_saved_ones(stages: dict[str, TrainedStage], change: str):
    assert_same_state(stages[ATTEMPTS[change][0]], stages[change])


def test_states_are_swapped_and_their_files_removed(stages: dict[str, TrainedStage]):
    """Every group but that of norms and biases has files of whole blocks for master weights and two moments."""
    for rank in (0, 1):
        files = json.loads((stages["disk half"].folder / f"swapped-{rank}.json").read_text())
        states = {name: size for name, size in files.items() if "gradient" not in name}
        masters = {name: size for name, size in states.items() if not name.startswith("exp_avg")}
        assert len(masters) > 1 and len(states) == 3 * len(masters)
        assert sum(masters.values()) > 0.9 * 4 * PARAMETERS / 2 and all(size % 1024 == 0 for size in states.values())
    assert not list(swap_root(tempfile.gettempdir()).glob(f"{RUN}-*"))
