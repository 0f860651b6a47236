"""Swap folders: that of a living process stays, and that of a killed one is removed at the next start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from longhaul.checks.node_facts import swap_facts
from longhaul.errors import UserError
from longhaul.runtime.swap_folders import remove_stale_swap_folders, swap_folder, swap_root

HOLD = """
import sys, time
from longhaul.runtime.swap_folders import swap_folder
with swap_folder(sys.argv[1], "run-base-rank-00000") as folder:
    (folder / "states").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(60)
"""


def test_folder_stays_while_its_process_lives(tmp_path: Path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    folder = Path(holder.stdout.readline().strip())
    assert folder.parent == swap_root(str(tmp_path)) and folder.name.startswith("run-base-rank-00000-")
    assert remove_stale_swap_folders(str(tmp_path)) == [] and (folder / "states").exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert folder.exists(), "a killed process removes nothing"
    facts = swap_facts(str(tmp_path))
    assert facts["removed"] == [folder.name] and facts["error"] is None and facts["free_bytes"] > 0
    assert list(swap_root(str(tmp_path)).iterdir()) == []


def test_folder_is_removed_at_the_end_of_the_block_even_after_an_error(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), swap_folder(str(tmp_path), "one") as folder:
        (folder / "states").write_bytes(b"x")
        raise KeyboardInterrupt
    assert not folder.exists()


def test_folder_that_others_may_write_to_is_refused(tmp_path: Path):
    swap_root(str(tmp_path)).chmod(0o777)
    with pytest.raises(UserError, match="optimizer states would be read from it"):
        remove_stale_swap_folders(str(tmp_path))
