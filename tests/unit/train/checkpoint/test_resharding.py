"""Adam's new state for a checkpoint of another layout is the state that torch itself makes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longhaul.checkpoint_io import OptimizerState
from longhaul.errors import UserError
from longhaul.train.checkpoint import resharding
from longhaul.train.checkpoint.checkpoint_folders import complete_checkpoints
from longhaul.train.checkpoint.resharding import load_resharded, new_adam_state
from tests.support.checkpoint_manifest import manifest_fields

STEPS = 3


def adamw(device: str, **options: Any) -> tuple[torch.optim.AdamW, torch.nn.Parameter]:
    flat = torch.nn.Parameter(torch.linspace(-1, 1, 64, device=device))
    return torch.optim.AdamW([flat], lr=0.1, **options), flat


@pytest.mark.parametrize("option", ["fused", "capturable"])
def test_the_step_count_is_on_the_device_where_a_kernel_reads_it(option: str):
    """The device meta takes the place of a GPU."""
    for options, device in (({option: True}, "meta"), ({}, "cpu")):
        adam, flat = adamw("meta", **options)
        state = new_adam_state(adam, flat, OptimizerState(STEPS, {"exp_avg": {}, "exp_avg_sq": {}}))
        assert (state["step"].device.type, state["step"].dtype) == (device, torch.float32)
        assert state["exp_avg"].device.type == "meta"


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=["plain", "fused", "foreach"])
def test_training_continues_with_the_same_bits(options: dict[str, Any]):
    whole, flat = adamw("cpu", **options)
    for step in range(2 * STEPS):
        if step == STEPS:
            again, copied = adamw("cpu", **options)
            copied.data.copy_(flat)
            saved = whole.state[flat]
            state = new_adam_state(again, copied, OptimizerState(STEPS, {"exp_avg": {}, "exp_avg_sq": {}}))
            assert {k: (v.shape, v.dtype, v.device) for k, v in state.items()} == {
                k: (v.shape, v.dtype, v.device) for k, v in saved.items()
            }
            again.state[copied] = state
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(saved[key])
        flat.grad = torch.full_like(flat, 0.1 * (step + 1))
        whole.step()
        if step >= STEPS:
            copied.grad = flat.grad.clone()
            again.step()
    assert torch.equal(flat, copied)


@pytest.mark.parametrize(
    ("stored", "state"), [({}, "does not have weight"), ({"weight": (2, 3)}, "has weight in shape")]
)
def test_checkpoint_of_another_model_is_refused_until_it_is_moved_away(
    stored: dict[str, tuple[int, int]], state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Then the checkpoint before it is the newest one."""
    masters = {name: SimpleNamespace(shape=shape) for name, shape in stored.items()}
    monkeypatch.setattr(resharding, "open_master_weights", lambda _folder: masters)
    monkeypatch.setattr(resharding, "open_optimizer_state", lambda _folder: None)
    for step in (3, 6):
        folder = tmp_path / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(manifest_fields({}, step=step)))
    with pytest.raises(UserError, match=f"step-00000006 {state}.*\n  remedy: .*move it away"):
        load_resharded(SimpleNamespace(module=torch.nn.Linear(2, 2, bias=False)), complete_checkpoints(tmp_path)[6])
    (tmp_path / "checkpoints/step-00000006").rename(tmp_path / "moved-away")
    assert list(complete_checkpoints(tmp_path)) == [3]
