"""Master weights read from real DeepSpeed checkpoints equal those gathered from the live engine, bit for bit."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longhaul.checkpoint_io import open_master_weights, open_optimizer_state, open_safetensors
from longhaul.checkpoint_io.torch_archive import Inert, StoredTensor, read_archive
from longhaul.errors import UserError

TAG = "weights/checkpoints/step-00000002"
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
    "deepseek-v3-z3-bf16",
)


@pytest.mark.parametrize("case", CASES)
def test_masters_equal_the_live_engine(zero_checkpoints: Path, case: str) -> None:
    gathered = load_file(zero_checkpoints / case / "reference.safetensors")
    masters = open_master_weights(zero_checkpoints / case / TAG)
    assert set(masters) == set(gathered)
    for name, wanted in gathered.items():
        found = masters[name].read()
        assert (found.dtype, found.shape) == (torch.float32, wanted.shape), name
        assert masters[name].shape == tuple(wanted.shape), name
        assert torch.equal(found, wanted), name


def test_every_case_is_checked(zero_checkpoints: Path) -> None:
    assert {path.parent.name for path in zero_checkpoints.glob("*/reference.safetensors")} == set(CASES)


@pytest.mark.parametrize("case", [case for case in CASES if "tied" in case])
def test_tied_weights_appear_once_with_an_alias(zero_checkpoints: Path, case: str) -> None:
    masters = open_master_weights(zero_checkpoints / case / TAG)
    assert {name: tensor.aliases for name, tensor in masters.items() if tensor.aliases} == {
        "model.embed_tokens.weight": ("lm_head.weight",)
    }


@pytest.mark.parametrize("case", ["llama-tied-z2-bf16", "llama-sub-groups-z3"])
def test_a_range_is_that_part_of_the_whole(zero_checkpoints: Path, case: str) -> None:
    tensor = open_master_weights(zero_checkpoints / case / TAG)["model.embed_tokens.weight"]
    flat = tensor.read().flatten()
    middle = tensor.numel // 2  # where the ranks' shares meet in ZeRO 3
    for start, stop in [(0, 5), (middle - 3, middle + 3), (tensor.numel - 1, tensor.numel), (7, 7)]:
        assert torch.equal(tensor.read_range(start, stop), flat[start:stop])


class Attack:
    """Runs a shell command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.command = f"touch {target}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_code_in_a_checkpoint_never_runs(zero_checkpoints: Path, tmp_path: Path) -> None:
    folder = copy(zero_checkpoints / "llama-z0", tmp_path)
    path, ran = folder / "mp_rank_00_model_states.pt", tmp_path / "ran"
    state = torch.load(path, weights_only=False)  # made by this test's own training
    torch.save({**state, "client": Attack(ran)}, path)
    assert len(open_master_weights(folder)) == 21
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists(), "the attack must be one that works"


def test_code_in_the_place_of_a_weight_is_refused(zero_checkpoints: Path, tmp_path: Path) -> None:
    folder = copy(zero_checkpoints / "llama-z0", tmp_path)
    path, ran = folder / "mp_rank_00_model_states.pt", tmp_path / "ran"
    state = torch.load(path, weights_only=False)
    state["module"]["model.norm.weight"] = Attack(ran)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"model\.norm\.weight is not a contiguous tensor"):
        open_master_weights(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    "instructions",
    [
        b"cposix\nsystem\n(S'touch {}'\ntR.",
        b"(S'touch {}'\niposix\nsystem\n.",
        b'cbuiltins\nexec\n(S\'open("{}", "w")\'\ntR.',
        b"c__main__\n__loader__\n}S'x'\nS'{}'\nsb.",
        b"ccollections\nOrderedDict\n(tRcposix\nsystem\n(S'touch {}'\ntR\x86.",
    ],
)
def test_pickle_instructions_build_only_plain_data(tmp_path: Path, instructions: bytes) -> None:
    ran = tmp_path / "ran"
    archive = tmp_path / "file.pt"
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("file/data.pkl", instructions.replace(b"{}", str(ran).encode()))
    found = read_archive(archive)
    assert not ran.exists()
    assert found is Inert or isinstance(found, Inert | tuple)


def _archive(path: Path, instructions: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as members:
        members.writestr("file/data.pkl", instructions)
        members.writestr("file/data/0", b"0" * 64)
    return path


STORAGE = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI16\ntQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE


@pytest.mark.parametrize(
    ("instructions", "says"),
    [
        (b"cbuiltins\ngetattr\n(cbuiltins\nobject\nV__subclasses__\ntR(tR.", "not callable"),
        (b"\x80\x04Nr\xff\xff\xff\x7f.", "its memo is to hold 2147483647 values"),
        (b"Np2147483647\n.", "its memo is to hold 2147483647 values"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", ""),
        (b"\x80\x05\x96\x00\x00\x00\x00\x01\x00\x00\x00.", ""),
        (b"ctorch\nSize\n}V__init__\nI1\nsb.", ""),
        (b"ctorch\nSize\nN}V__init__\nI1\ns\x86b.", ""),
        (STORAGE + b"N}Vkey\nV1\ns\x86b.", "cannot assign to field 'key'"),
        (b"\x82\x01.", "unregistered extension code 1"),
        (b"2.", ""),
        (b"Vt\nQ.", "not enough values"),
        (b"NQ.", ""),
        (b"\xff.", ""),
        (TENSOR + b"I0\n(I-4\nt(I1\ntI0\nNtR.", "a tensor has offset 0 and shape"),
        (TENSOR + b"I-4\n(I4\nt(I1\ntI0\nNtR.", "a tensor has offset -4 and shape"),
        (TENSOR + b"I0\n(F2.5\nt(I1\ntI0\nNtR.", "a tensor has offset 0 and shape"),
        (TENSOR + b"I1\n(I16\nt(I1\ntI0\nNtR.", "storage 0 is shorter than its tensor of shape"),
    ],
)
def test_hostile_pickles_are_refused_and_take_no_memory(tmp_path: Path, instructions: bytes, says: str) -> None:
    path = _archive(tmp_path / "file.pt", instructions)
    with pytest.raises(UserError, match=rf"file\.pt is not a readable torch checkpoint: .*{says}"):
        read_archive(path)


def test_a_pickle_that_would_unpack_to_much_is_refused(tmp_path: Path) -> None:
    path = _archive(tmp_path / "file.pt", b"V" + b"a" * 10**6 + b"\n.", zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"member file/data\.pkl is compressed"):
        read_archive(path)


@pytest.mark.parametrize("state", [b"}Vitems\ncos\nsystem\nsb", b"N}Vitems\ncos\nsystem\ns\x86b"])
def test_a_pickle_cannot_put_its_own_in_place_of_methods(tmp_path: Path, state: bytes) -> None:
    """torch.save does set an attribute of a state dict, `_metadata`, which is ignored."""
    path = _archive(tmp_path / "file.pt", b"ccollections\nOrderedDict\n(tRVkey\nI1\ns" + state + b".")
    assert list(read_archive(path).items()) == [("key", 1)]


@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_rebuild_parameter"])
def test_a_pickle_leaves_no_mark_on_the_reader(tmp_path: Path, name: str) -> None:
    code = b"ctorch._utils\n" + name.encode() + b"\n}Vmark\nI1\nsb."
    assert read_archive(_archive(tmp_path / "file.pt", code)).mark == 1
    again = read_archive(_archive(tmp_path / "file.pt", b"ctorch._utils\n" + name.encode() + b"\n."))
    assert not hasattr(again, "mark")


@pytest.mark.parametrize("reader", [open_master_weights, open_optimizer_state])
@pytest.mark.parametrize("content", ["a text", {"module": 1, "optimizer": 2}, {"module": {"x": 1}, "optimizer": []}])
def test_content_that_is_not_a_checkpoints_is_refused(tmp_path: Path, content: object, reader) -> None:
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"not laid out as DeepSpeed writes|not a contiguous tensor"):
        reader(tmp_path)


def test_tensors_stay_on_disk(tmp_path: Path) -> None:
    whole = torch.arange(12, dtype=torch.float16)
    torch.save({"part": whole[4:10].view(2, 3), "turned": whole.view(3, 4).T, "kind": torch.float16}, tmp_path / "t.pt")
    found = read_archive(tmp_path / "t.pt")
    part = found["part"]
    assert (type(part), part.shape, part.dtype) == (StoredTensor, (2, 3), torch.float16)
    data = (tmp_path / "t.pt").read_bytes()[part.offset_bytes : part.offset_bytes + 12]
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float16), whole[4:10])
    assert isinstance(found["turned"], Inert)


def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    torch.save({"x": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as members:
        content = {name: members.read(name) for name in members.namelist()}
    content["t/data/0"] = content["t/data/0"][:8]
    with zipfile.ZipFile(path, "w") as members:
        for name, data in content.items():
            members.writestr(name, data)
    with pytest.raises(UserError, match=r"storage 0 is shorter than its tensor of shape \[4\]"):
        read_archive(path)


def copy(case: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(case / "weights/checkpoints/step-00000002", tmp_path / "step"))


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
        (lambda f: (f / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink(), r"ranks \[1\]: some are missing"),
        (
            lambda f: (f / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(),
            r"by \[2\] data-parallel ranks but holds 1",
        ),
        (lambda f: (f / "mp_rank_01_model_states.pt").touch(), "tensor parallelism"),
        (lambda f: (f / "layer_00-model_00-model_states.pt").touch(), "pipeline parallelism"),
    ],
)
def test_a_damaged_checkpoint_is_refused(zero_checkpoints: Path, tmp_path: Path, damage, message: str) -> None:
    folder = copy(zero_checkpoints / "llama-tied-z1", tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_master_weights(folder)


def test_half_precision_without_masters_is_refused(zero_checkpoints: Path, tmp_path: Path) -> None:
    folder = copy(zero_checkpoints / "one-llama-z1", tmp_path)
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink(missing_ok=True)
    (folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"holds torch\.bfloat16 weights .* and no fp32 master copy"):
        open_master_weights(folder)


def _doubled(path: Path) -> None:
    header = (
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    )
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "and its header speaks of"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"[4]", b"[5]")), "x does not have the 5 elements"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "no whole safetensors header"),
        (lambda path: path.write_bytes(b"\1"), "no whole safetensors header"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"x"', b"'x'")), "no readable safetensors header"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"F32", b"F99")), "x has type F99"),
        (_doubled, "x stands in it twice"),
    ],
)
def test_a_damaged_safetensors_file_is_refused(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(4)}, path)
    damage(path)
    with pytest.raises(UserError, match=message):
        open_safetensors(path)
