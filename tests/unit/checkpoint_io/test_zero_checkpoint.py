"""Master weights read from real DeepSpeed checkpoints are bit-identical to those gathered from the live engine."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longhaul.checkpoint_io import open_master_weights, open_optimizer_state
from longhaul.errors import UserError

CHECKPOINT = "weights/checkpoints/step-00000002"
CASES = (
    "one-llama-z0",
    "one-llama-z1",
    "one-llama-z3",
    "llama-z0",
    "llama-tied-z0",
    "llama-tied-z1",
    "llama-tied-z2-bf16",
    "llama-tied-z3-bf16",
    "llama-frozen-z1",
    "llama-frozen-z2",
    "llama-frozen-z3",
    "llama-offload-z2",
    "llama-offload-z3",
    "llama-round-robin-z2",
    "llama-sub-groups-z3",
    "qwen3-z1-fp16",
    "qwen3-z3-fp16",
    "qwen3-moe-z1-bf16",
    "qwen3-moe-z3",
    "deepseek-v2-z2",
    "deepseek-v3-z1",
    "deepseek-v3-tied-z1",
    "deepseek-v3-z3-bf16",
)


@pytest.mark.parametrize("case", CASES)
def test_master_weights_equal_those_of_the_live_engine(zero_checkpoints: Path, case: str) -> None:
    gathered = load_file(zero_checkpoints / case / "reference.safetensors")
    masters = open_master_weights(zero_checkpoints / case / CHECKPOINT)
    assert set(masters) == set(gathered)
    for name, wanted in gathered.items():
        found = masters[name].read()
        assert (found.dtype, found.shape) == (torch.float32, wanted.shape), name
        assert masters[name].shape == tuple(wanted.shape), name
        assert torch.equal(found, wanted), name


def test_every_trained_case_is_listed_here(zero_checkpoints: Path) -> None:
    assert {path.parent.name for path in zero_checkpoints.glob("*/reference.safetensors")} == set(CASES)


@pytest.mark.parametrize("case", [case for case in CASES if "tied" in case])
def test_tied_weights_appear_once_with_an_alias(zero_checkpoints: Path, case: str) -> None:
    masters = open_master_weights(zero_checkpoints / case / CHECKPOINT)
    assert {name: tensor.aliases for name, tensor in masters.items() if tensor.aliases} == {
        "model.embed_tokens.weight": ("lm_head.weight",)
    }


@pytest.mark.parametrize("case", ["llama-tied-z2-bf16", "llama-sub-groups-z3"])
def test_a_range_equals_the_same_range_of_the_whole_tensor(zero_checkpoints: Path, case: str) -> None:
    tensor = open_master_weights(zero_checkpoints / case / CHECKPOINT)["model.embed_tokens.weight"]
    flat = tensor.read().flatten()
    middle = tensor.numel // 2  # the border of the two ranks' partitions in ZeRO 3
    for start, stop in [(0, 5), (middle - 3, middle + 3), (tensor.numel - 1, tensor.numel), (7, 7)]:
        assert torch.equal(tensor.read_range(start, stop), flat[start:stop])


class Attack:
    """Runs a shell command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.command = f"touch {target}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_code_in_a_checkpoint_does_not_run(zero_checkpoints: Path, tmp_path: Path) -> None:
    folder = copy(zero_checkpoints / "llama-z0", tmp_path)
    path, ran = folder / "mp_rank_00_model_states.pt", tmp_path / "ran"
    state = torch.load(path, weights_only=False)  # a file of the fixture's own training
    torch.save({**state, "client": Attack(ran)}, path)
    assert len(open_master_weights(folder)) == 21
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists(), "torch.load must run the code, or this test shows nothing"


def test_code_in_the_place_of_a_weight_is_refused(zero_checkpoints: Path, tmp_path: Path) -> None:
    folder = copy(zero_checkpoints / "llama-z0", tmp_path)
    path, ran = folder / "mp_rank_00_model_states.pt", tmp_path / "ran"
    state = torch.load(path, weights_only=False)
    state["module"]["model.norm.weight"] = Attack(ran)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"model\.norm\.weight is not a contiguous tensor"):
        open_master_weights(folder)
    assert not ran.exists()


@pytest.mark.parametrize("reader", [open_master_weights, open_optimizer_state])
@pytest.mark.parametrize("content", ["a text", {"module": 1, "optimizer": 2}, {"module": {"x": 1}, "optimizer": []}])
def test_content_without_the_structure_of_a_checkpoint_is_refused(tmp_path: Path, content: object, reader) -> None:
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"not have the structure of a DeepSpeed checkpoint|not a contiguous tensor"):
        reader(tmp_path)


def copy(case: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(case / CHECKPOINT, tmp_path / "step"))


def truncate(folder: Path) -> None:
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:5000])


def compress(folder: Path) -> None:
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with zipfile.ZipFile(path) as members:
        content = {name: members.read(name) for name in members.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as members:
        for name, data in content.items():
            members.writestr(name, data)


def old_format(folder: Path) -> None:
    stream = io.BytesIO()
    pickle.dump({}, stream)
    (folder / "mp_rank_00_model_states.pt").write_bytes(stream.getvalue())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "zero_pp_rank_1_mp_rank_00_optim_states.pt is not a readable torch checkpoint"),
        (compress, "is compressed"),
        (old_format, "mp_rank_00_model_states.pt is not a readable torch checkpoint"),
        (lambda f: (f / "mp_rank_00_model_states.pt").unlink(), "mp_rank_00_model_states.pt does not exist"),
        (lambda f: (f / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink(), r"ranks \[1\] only: some are missing"),
        (
            lambda f: (f / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(),
            r"by \[2\] data-parallel ranks but holds 1",
        ),
        (lambda f: (f / "mp_rank_01_model_states.pt").touch(), "tensor parallelism"),
        (lambda f: (f / "layer_00-model_00-model_states.pt").touch(), "pipeline or expert parallelism"),
    ],
)
def test_a_damaged_checkpoint_is_refused(zero_checkpoints: Path, tmp_path: Path, damage, message: str) -> None:
    folder = copy(zero_checkpoints / "llama-tied-z1", tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_master_weights(folder)


def test_16_bit_weights_without_master_weights_are_refused(zero_checkpoints: Path, tmp_path: Path) -> None:
    folder = copy(zero_checkpoints / "one-llama-z1", tmp_path)
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink(missing_ok=True)
    (folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"holds torch\.bfloat16 weights .* and no fp32 master weights"):
        open_master_weights(folder)
