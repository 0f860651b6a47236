"""torch.save files are read without running code of the file, without reading tensors, and with bounded memory."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from longhaul.checkpoint_io.torch_archive import InertObject, StoredTensor, read_archive
from longhaul.errors import UserError


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
    assert found is InertObject or isinstance(found, InertObject | tuple)


def write_archive(path: Path, instructions: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as members:
        members.writestr("file/data.pkl", instructions)
        members.writestr("file/data/0", b"0" * 64)
    return path


STORAGE = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI16\ntQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (b"cbuiltins\ngetattr\n(cbuiltins\nobject\nV__subclasses__\ntR(tR.", "not callable"),
        (b"\x80\x04Nr\xff\xff\xff\x7f.", "its memo index 2147483647 exceeds the"),
        (b"Np2147483647\n.", "its memo index 2147483647 exceeds the"),
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
def test_hostile_pickles_are_refused_and_take_no_memory(tmp_path: Path, instructions: bytes, message: str) -> None:
    path = write_archive(tmp_path / "file.pt", instructions)
    with pytest.raises(UserError, match=rf"file\.pt is not a readable torch checkpoint: .*{message}"):
        read_archive(path)


def test_a_compressed_pickle_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "file.pt", b"V" + b"a" * 10**6 + b"\n.", zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"member file/data\.pkl is compressed"):
        read_archive(path)


@pytest.mark.parametrize("state", [b"}Vitems\ncos\nsystem\nsb", b"N}Vitems\ncos\nsystem\ns\x86b"])
def test_a_pickle_cannot_replace_methods_of_a_dict(tmp_path: Path, state: bytes) -> None:
    """torch.save itself sets an attribute of a state dict, `_metadata`; the reader ignores it."""
    path = write_archive(tmp_path / "file.pt", b"ccollections\nOrderedDict\n(tRVkey\nI1\ns" + state + b".")
    assert list(read_archive(path).items()) == [("key", 1)]


@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_rebuild_parameter"])
def test_a_pickle_cannot_change_the_reader(tmp_path: Path, name: str) -> None:
    code = b"ctorch._utils\n" + name.encode() + b"\n}Vmark\nI1\nsb."
    assert read_archive(write_archive(tmp_path / "file.pt", code)).mark == 1
    again = read_archive(write_archive(tmp_path / "file.pt", b"ctorch._utils\n" + name.encode() + b"\n."))
    assert not hasattr(again, "mark")


def test_tensors_stay_on_disk(tmp_path: Path) -> None:
    whole = torch.arange(12, dtype=torch.float16)
    torch.save({"part": whole[4:10].view(2, 3), "turned": whole.view(3, 4).T, "kind": torch.float16}, tmp_path / "t.pt")
    found = read_archive(tmp_path / "t.pt")
    part = found["part"]
    assert (type(part), part.shape, part.dtype) == (StoredTensor, (2, 3), torch.float16)
    data = (tmp_path / "t.pt").read_bytes()[part.offset_bytes : part.offset_bytes + 12]
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float16), whole[4:10])
    assert isinstance(found["turned"], InertObject)


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
