"""`longhaul status` and `doctor` find the run that the user names."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.scheduling.show_status import run_paths


@pytest.mark.parametrize("named", [".", "../small", "../../results/small"])
def test_run_is_found_by_its_folder_from_inside(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "results/small"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    found = run_paths(Path(named))
    assert found.run == "small" and found.folder.samefile(folder)
