"""Reads small text files of the kernel below /sys and /proc; a file that cannot be read counts as empty."""

from __future__ import annotations

from pathlib import Path

SYS = Path("/sys")


def read_text(path: Path) -> str:
    """Return a file's text without spaces around it; "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
