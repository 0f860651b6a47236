"""Runs the demo in a terminal, and makes the images of docs/images from it: make images (Chromium is needed).

FOLDER=<folder with results/demo> takes a demo that has run there, and makes all images but running.svg.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page
from rich.console import Console
from rich.text import Text

from tests.support.browser import headless_browser, installed_browser

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SHOWN_ROOT = "~/longhaul"
"""Path of the checkout in the images, which do not show the machine that made them."""
COLUMNS, ROWS = 120, 50
STATUS_COLUMNS = 100
VIEWPORT = {"width": 1240, "height": 1010}
TRAINS = re.compile(r"^chat +\S*running.* \d+\.\d{3} ")
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_TOKENS = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+")
_INCOMPLETE = re.compile(r"\x1b(\[[\d;?]*)?$")


class Screen:
    """The lines of a terminal. It knows what Rich's live display sends: line ends, cursor up, line erased, colours."""

    def __init__(self) -> None:
        self.lines = [""]
        self._row, self._incomplete = 0, ""

    def feed(self, text: str) -> None:
        """Show a text that a program printed; an escape sequence may end in the next one."""
        text = self._incomplete + text
        cut = _INCOMPLETE.search(text)
        text, self._incomplete = (text[: cut.start()], cut[0]) if cut else (text, "")
        for token in _TOKENS.findall(text):
            if token == "\n":
                self._row += 1
                self.lines += [""] * (self._row + 1 - len(self.lines))
            elif token == "\x1b[2K":
                self.lines[self._row] = ""
            elif up := re.fullmatch(r"\x1b\[(\d*)A", token):
                self._row = max(0, self._row - int(up[1] or 1))
            elif token != "\r" and (not token.startswith("\x1b") or _COLOURS.fullmatch(token)):
                self.lines[self._row] += token

    def plain_lines(self) -> list[str]:
        """Return the lines without colours."""
        return [_COLOURS.sub("", line) for line in self.lines]


def main() -> None:
    """Write every image, and print what the terminal of the demo showed at its end."""
    program = installed_browser()
    if program is None:
        sys.exit("Chromium is missing: make test-packages installs it")
    if len(sys.argv) > 1:
        write_results(program, Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running, ended = run_demo(folder)
        print("\n".join(ended))
        write_svg(IMAGES / "running.svg", running, COLUMNS, "longhaul run demo")
        write_results(program, folder)


def write_results(program: str, folder: Path) -> None:
    """Write the images of the status and the report of a demo that has run in `folder`."""
    shown = printed(["status", "results/demo"], folder)
    write_svg(IMAGES / "status.svg", shown, STATUS_COLUMNS, "longhaul status results/demo")
    printed(["report", "results/demo"], folder)
    write_pages(program, folder / "results" / "demo" / "report.html")


def run_demo(folder: Path) -> tuple[list[str], list[str]]:
    """Run the demo in a terminal. Return the lines while stage chat trains, and those at the end without colours."""
    screen, running = Screen(), [""]

    def show(text: str) -> None:
        nonlocal running
        screen.feed(text)
        if any(TRAINS.match(line) for line in screen.plain_lines()):
            running = list(screen.lines)

    if code := _run_in_terminal(["run", "demo"], folder, show):
        sys.exit("\n".join([*screen.plain_lines(), f"the demo exited with code {code}"]))
    return running, screen.plain_lines()


def _run_in_terminal(words: list[str], folder: Path, show: Callable[[str], None]) -> int:
    """Run longhaul in a terminal of COLUMNS x ROWS, pass on what it prints, and return its exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow"), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "longhaul", *words]
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        while data := _read(ours):
            show(decoder.decode(data))
    os.close(ours)
    return process.returncode


def _read(terminal: int) -> bytes:
    """Return what was printed next; nothing at the end, which Linux reports as an error of the terminal."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def printed(words: list[str], folder: Path) -> list[str]:
    """Return what a command of longhaul prints in a terminal."""
    screen = Screen()
    if _run_in_terminal(words, folder, screen.feed):
        sys.exit("\n".join(screen.plain_lines()))
    return screen.lines


def write_svg(path: Path, lines: list[str], columns: int, title: str) -> None:
    """Draw lines of a terminal."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=columns, file=nowhere, force_terminal=True)
        console.print(Text.from_ansi("\n".join(lines).rstrip().replace(str(ROOT), SHOWN_ROOT)))
    console.save_svg(str(path), title=title)


def write_pages(program: str, report: Path) -> None:
    """Photograph the top of the report, and the section of its first stage."""
    with headless_browser(program) as browser:
        page: Page = browser.new_page(viewport=VIEWPORT)  # pyright: ignore[reportArgumentType]
        page.goto(report.as_uri())
        page.wait_for_selector(".main-svg")
        page.screenshot(path=IMAGES / "report-summary.png")
        page.evaluate("document.querySelector('#stage-pretrain').scrollIntoView()")
        page.wait_for_timeout(500)
        page.screenshot(path=IMAGES / "report.png")


if __name__ == "__main__":
    main()
