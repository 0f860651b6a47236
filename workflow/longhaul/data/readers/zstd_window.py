"""Reads from a .zst header how much memory decompression needs, and refuses more than 128 MiB."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from longhaul.data.readers.rows_and_file_ranges import BadData

MAX_WINDOW_BYTES = 1 << 27
"""Limit of the decompressor: without it, a small file could demand any amount of memory."""
_MAGIC = b"\x28\xb5\x2f\xfd"
_SIZE_FIELDS = (0, 2, 4, 8)  # bytes of Frame_Content_Size by its flag; 1 in place of 0 for a single segment
_DICTIONARY_FIELDS = (0, 1, 2, 4)


def require_readable_window(path: Path, stream: BinaryIO) -> None:
    """Raise BadData if a frame demands more memory than the decompressor allows. The stream stays at its start."""
    window = _window_bytes(stream.read(18))
    stream.seek(0)
    if window > MAX_WINDOW_BYTES:
        message = (
            f"{path} needs a window of {window / 2**20:,.0f} MiB; files up to {MAX_WINDOW_BYTES >> 20} MiB can be read"
        )
        raise BadData.with_reason("window too large", message, "compress it again without zstd's --long and --ultra")


def _window_bytes(header: bytes) -> int:
    """Return the size of the window in bytes; 0 for what is no Zstandard frame."""
    if len(header) < 6 or header[:4] != _MAGIC:
        return 0
    descriptor = header[4]
    if not descriptor & 0x20:  # no single segment: a byte describes the window
        base = 1 << (10 + (header[5] >> 3))
        return base + base // 8 * (header[5] & 7)
    flag = descriptor >> 6
    start = 5 + _DICTIONARY_FIELDS[descriptor & 3]
    size = int.from_bytes(header[start : start + (_SIZE_FIELDS[flag] or 1)], "little")
    return size + 256 if flag == 1 else size
