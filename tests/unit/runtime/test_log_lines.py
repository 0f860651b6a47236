"""Lines that jobs print begin with the time and have no escape codes."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longhaul.runtime.log_lines import StampedLines, plain_line

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("\x1b[1;31mred\x1b[0m and \x1b[3mNodes\x1b[0m", "red and Nodes"),
        ("\rLoading:   0%\rLoading: 100%", "Loading: 100%"),
        ("Loading: 100%\r", "Loading: 100%"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b[2Ktext\x1b[?25h", "text"),
        ("array[0m] stays", "array[0m] stays"),
    ],
)
def test_escape_codes_and_earlier_states_of_a_bar_are_left_out(line: str, expected: str) -> None:
    assert plain_line(line) == expected


def test_a_line_is_passed_on_when_it_is_complete() -> None:
    out = io.StringIO()
    stream = StampedLines(out)
    stream.write("step 1")
    assert out.getvalue() == ""
    stream.write("/2\nstep 2/2\n\nrest")
    assert re.fullmatch(rf"{STAMP}step 1/2\n{STAMP}step 2/2\n\n", out.getvalue())
    stream.end_line()
    stream.end_line()
    assert re.search(rf"{STAMP}rest\n$", out.getvalue()) and out.getvalue().count("rest") == 1


def test_a_process_stamps_its_traceback_and_its_last_line(tmp_path: Path) -> None:
    code = "from longhaul.runtime.log_lines import stamp_lines; stamp_lines(); stamp_lines(); print('no end', end=''); 1 / 0"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.fullmatch(rf"{STAMP}no end\n", done.stdout)
    assert re.search(rf"^{STAMP}ZeroDivisionError: division by zero$", done.stderr, re.MULTILINE)


def test_jobs_stamp_what_they_print_and_other_verbs_do_not(tmp_path: Path) -> None:
    for verb, start in ((["job", "run", "no-kind", "spec"], STAMP), (["retry", str(tmp_path)], "")):
        command = [sys.executable, "-m", "longhaul", *verb]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and re.match(f"{start}error: ", done.stderr), done.stderr
