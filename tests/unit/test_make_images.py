"""The images of the docs show what a terminal shows."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.live import Live
from rich.text import Text

from docs.make_images import IMAGES, ROOT, SHOWN_ROOT, TRAINS, Screen, write_svg
from longhaul.report.status_text import progress_view
from tests.unit.report.test_status_text import STAGE, STATUS


@pytest.mark.parametrize("part", [1, 7, 10_000])
def test_screen_shows_the_last_state_of_a_live_display(part: int) -> None:
    """Lines that are printed meanwhile stand above it, colours are kept, and output may come in parts of any length."""
    stream, screen = StringIO(), Screen()
    console = Console(file=stream, force_terminal=True, width=60, highlight=False, color_system="standard")
    with Live(Text("first\nsecond"), console=console, auto_refresh=False) as live:
        live.refresh()
        console.print("a job started")
        live.update(Text("third", style="red"), refresh=True)
    printed = stream.getvalue().replace("\n", "\r\n")
    for start in range(0, len(printed), part):
        screen.feed(printed[start : start + part])
    assert [line.rstrip() for line in screen.plain_lines() if line.strip()] == ["a job started", "third"]
    assert "\x1b[31mthird\x1b[0m" in "".join(screen.lines)


def test_moment_at_which_the_second_stage_trains_is_recognised() -> None:
    stream = StringIO()
    status = replace(STATUS, stages=[replace(STAGE, name="chat")])
    Console(file=stream, width=120).print(progress_view(status))
    assert any(TRAINS.match(line) for line in stream.getvalue().splitlines())
    assert not TRAINS.match("chat      not started  0/90   ━━━━━━━━━━")


def test_images_do_not_name_a_path_of_the_machine_that_made_them(tmp_path: Path) -> None:
    write_svg(tmp_path / "image.svg", [f"config {ROOT}/config/config.yaml"], 100, "title")
    assert f"{SHOWN_ROOT}/config/config.yaml" in (tmp_path / "image.svg").read_text()
    for image in (tmp_path / "image.svg", *IMAGES.glob("*.svg")):
        shown = image.read_text().replace("&#160;", " ")
        assert [path for path in re.findall(r"(?<=[ >])/\w+/[\w/.-]*", shown) if "clip-path" not in path] == [], image
