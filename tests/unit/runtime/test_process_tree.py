"""All processes below one are killed, and one that cannot be is named and left behind."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from longhaul.runtime import process_tree

_TREE = """
import subprocess, sys
from longhaul.runtime import process_tree

process_tree.adopt_orphans()
kill = process_tree._kill
child = subprocess.Popen([sys.executable, "-c", "import subprocess; subprocess.Popen(['sleep', '60']).wait()"])
if sys.argv[1] == "unkillable":
    process_tree._kill, process_tree._UNKILLABLE_S = lambda process: None, 0.3
process_tree.kill_descendants()
print(child.pid, len(process_tree.psutil.Process().children()), flush=True)
process_tree._kill = kill
process_tree.kill_descendants()
"""


def run(kind: str) -> list[str]:
    command = [sys.executable, "-c", _TREE, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=os.environ)
    return done.stdout.splitlines()


def test_children_and_their_children_are_killed():
    (line,) = run("killable")
    assert line.split()[1] == "0"


def test_process_that_cannot_be_killed_is_named_and_left_behind():
    """Nothing can make such a process, so here the signal is not sent."""
    named, line = run("unkillable")
    child, left = line.split()
    assert (
        named.startswith(f"processes that SIGKILL does not end within 0.3 s are left behind: {child} (") and left == "1"
    )


def test_process_that_ends_while_it_is_named_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    child = subprocess.Popen(["sleep", "600"])
    ended = psutil.Process(child.pid)
    child.kill()
    child.wait()
    monkeypatch.setattr(psutil.Process, "children", lambda process: [ended])
    monkeypatch.setattr(process_tree, "_UNKILLABLE_S", 0.0)
    process_tree.kill_descendants()
    assert capsys.readouterr().out.endswith(f"left behind: {child.pid}\n")
