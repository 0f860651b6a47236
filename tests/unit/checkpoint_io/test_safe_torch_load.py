"""A torch.save file is loaded whole without running what it names: tensors and DeepSpeed's own objects only."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longhaul.checkpoint_io.safe_torch_load import load_plain_data
from longhaul.compat.deepspeed import files_read_with
from longhaul.errors import UserError
from tests.support.launch_ranks import launch_worker
from tests.support.pipeline_run import REPOSITORY
from tests.support.unpickling_payloads import put_payload


class RunsCode:
    """Its unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


def deepspeed_objects() -> dict[str, Any]:
    """Return what DeepSpeed saves in addition to tensors."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    options = {"init_scale": 256, "scale_window": 5, "min_scale": 1, "delayed_shift": 2}
    scaler = DynamicLossScaler(**options, consecutive_hysteresis=False, raise_error_at_min_scale=True, dtype=torch.half)
    return {
        "loss_scaler": scaler,
        "static": LossScaler(scale=1.0),
        "zero_stage": ZeroStageEnum.weights,
        "mapping": {"w": fragment_address(start=3, numel=4)},
        "weights": torch.nn.Parameter(torch.arange(4.0)),
        "names": {"a"},
    }


def loaded_by_engine(path: Path) -> Any:
    engine: Any = SimpleNamespace(checkpoint_engine="usual")
    with files_read_with(engine, load_plain_data):
        found = engine.checkpoint_engine.load(str(path), map_location="cpu")
    assert engine.checkpoint_engine == "usual"
    return found


def test_what_deepspeed_saves_is_loaded(tmp_path: Path):
    saved = deepspeed_objects()
    torch.save(saved, tmp_path / "file.pt")
    found = loaded_by_engine(tmp_path / "file.pt")
    assert vars(found["loss_scaler"]) == vars(saved["loss_scaler"])
    assert type(found["loss_scaler"]) is type(saved["loss_scaler"]) and found["static"].cur_scale == 1.0
    assert found["zero_stage"] == 3 and found["mapping"] == saved["mapping"] and found["names"] == {"a"}
    assert torch.equal(found["weights"], saved["weights"])


def test_engines_of_every_precision_resume():
    """Their files hold loss scalers, addresses of fragments and plain data only."""
    done = launch_worker(REPOSITORY / "tests/support/resume_in_every_precision.py", 1, timeout_s=200)
    resumed = [line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith("RESUMED ")]
    expected = [f"{zero_stage} {precision}: True" for zero_stage in range(4) for precision in ("fp16", "bf16")]
    assert resumed == expected, done.stderr[-4000:]


def test_a_payload_is_refused_and_does_not_run(tmp_path: Path):
    """The same files run code when they are read as DeepSpeed reads them."""
    path, marker = tmp_path / "file.pt", tmp_path / "ran"
    torch.save(deepspeed_objects(), path)
    put_payload(path, marker)
    with pytest.raises(UserError, match=r"file\.pt is not read.*posix\.system") as refused:
        loaded_by_engine(path)
    assert "weights_only" not in str(refused.value) and "may hold code" in refused.value.hint
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy format"])
def test_objects_of_other_classes_are_refused(legacy: bool, tmp_path: Path):
    path, marker = tmp_path / "file.pt", tmp_path / "ran"
    torch.save({"a": [RunsCode(marker)]}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"holds more than tensors and plain data.*exec"):
        load_plain_data(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02.", pickle.dumps({"a": 1}), b"\x80\x04Nr\xff\xff\xff\x7f."])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"file\.pt") as refused:
        load_plain_data(tmp_path / "file.pt")
    assert "the checkpoint before it is used" in refused.value.hint
    with pytest.raises(UserError, match="does not exist"):
        load_plain_data(tmp_path / "none.pt")
