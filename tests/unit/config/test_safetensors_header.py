"""Headers of safetensors files that are no header."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.config.safetensors_header import safetensors_header
from longhaul.errors import UserError


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b"[]", b'{"a": 1}', b'{"a": {"data_offsets": ["x", "y"]}}', b"\xff"]
)
def test_what_is_no_header_is_refused(tmp_path: Path, header: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match=r"model.safetensors has no valid safetensors header"):
        safetensors_header(path)
