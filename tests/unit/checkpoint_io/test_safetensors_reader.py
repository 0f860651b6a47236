"""A damaged safetensors file is refused with a message that names the problem."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longhaul.checkpoint_io import open_safetensors
from longhaul.errors import UserError


def write_duplicate_name(path: Path) -> None:
    header = (
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    )
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "but its header describes"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"[4]", b"[5]")), "x does not have the 5 elements"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "no complete safetensors header"),
        (lambda path: path.write_bytes(b"\1"), "no complete safetensors header"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"x"', b"'x'")), "no valid safetensors header"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"F32", b"F99")),
            "x has type F99, which is not supported",
        ),
        (write_duplicate_name, "the name x occurs twice"),
    ],
)
def test_a_damaged_safetensors_file_is_refused_until_it_is_written_again(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(4)}, path)
    damage(path)
    with pytest.raises(UserError, match=message):
        open_safetensors(path)
    save_file({"x": torch.ones(4)}, path)
    assert [*open_safetensors(path)] == ["x"]
