"""A link is replaced at once, and nothing else is replaced by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.artifacts.atomic_files import replace_link
from longhaul.errors import UserError


def test_link_replaces_a_link_and_nothing_else(tmp_path: Path):
    link = tmp_path / "latest"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    replace_link(link, "a")
    replace_link(link, "b")
    assert link.resolve() == tmp_path / "b" and sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "latest"]
    link.unlink()
    link.mkdir()
    with pytest.raises(UserError, match="is not a link") as failed:
        replace_link(link, "a")
    assert "move it away" in failed.value.hint
    link.rename(tmp_path / "away")
    replace_link(link, "a")
    assert link.resolve() == tmp_path / "a"
