"""Measurements under load, and that lost or exchanged answers are noticed; the connections answer without a server."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from longhaul.errors import UserError
from longhaul.serving import measure_load as module
from longhaul.serving.ask_server import Answer
from longhaul.serving.measure_load import MemoryPeak, answers_alone, measure_load, used_gpu_bytes

PROMPTS = ["one", "two", "three", "four"]


class Echo:
    """Answers each prompt with itself, in three pieces at 0.1, 0.3 and 0.7 s."""

    async def answer(self, prompt: str, most_tokens: int) -> Answer:
        await asyncio.sleep(0)
        return Answer(prompt, "length", (), 3, (0.1, 0.3, 0.7))


class Exchange(Echo):
    """Gives the first two requests at the same time each other's answers."""

    def __init__(self) -> None:
        self.waiting = 0

    async def answer(self, prompt: str, most_tokens: int) -> Answer:
        self.waiting += 1
        await asyncio.sleep(0.01)
        exchanged = {"one": "two", "two": "one"} if self.waiting > 1 else {}
        return await super().answer(exchanged.get(prompt, prompt), most_tokens)


class Loss(Echo):
    async def answer(self, prompt: str, most_tokens: int) -> Answer:
        if prompt == "three":
            raise UserError("the server lost an answer: it ended without a finish reason")
        return await super().answer(prompt, most_tokens)


def measured(connection):
    async def run():
        alone = await answers_alone(Echo(), PROMPTS, 8)  # pyright: ignore[reportArgumentType]
        return await measure_load(connection, PROMPTS, alone, 8, 0.1)

    return asyncio.run(run())


def test_times_and_rates():
    step = measured(Echo())
    assert (step["streams"], step["tokens"]) == (4, 12)
    assert step["tokens_per_s"] > 0
    assert step["first_token_median_s"] == step["first_token_p99_s"] == pytest.approx(0.1)
    assert step["inter_token_median_s"] == pytest.approx(0.3)  # half of the gaps are 0.2, the others 0.4
    assert step["inter_token_p99_s"] == pytest.approx(0.4)


def test_exchanged_and_lost_answers_are_noticed():
    message = r"with 4 requests at the same time, answer 1 is not the answer to its prompt: 'two' instead of 'one'"
    with pytest.raises(UserError, match=message):
        measured(Exchange())
    with pytest.raises(UserError, match="lost an answer"):
        measured(Loss())


FORKS = """
import os, sys
held = bytearray(b"x") * (64 << 20)
for _ in range(3):
    if not os.fork():
        break
print(len(held), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def forked() -> Iterator[psutil.Process]:
    """A process whose 64 MiB are also those of its three children."""
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        for _ in range(4):
            process.stdout.readline()
        yield psutil.Process(process.pid)
        process.stdin.close()


def peak_of(process: psutil.Process) -> MemoryPeak:
    with MemoryPeak(process) as memory:
        pass
    return memory


def test_a_page_that_processes_share_counts_once(forked: psutil.Process):
    memory = peak_of(forked)
    assert 64 << 20 < memory.host_bytes < 128 << 20
    assert memory.shared_pages_count_once


@pytest.mark.parametrize("content", [None, "", "00400000-7ffe0000 ---p 00000000 00:00 0 [rollup]\nRss: 1 kB\n"])
def test_resident_memory_is_whole_where_shares_cannot_be_read(
    forked: psutil.Process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
):
    monkeypatch.setattr(module, "_PROC", tmp_path)
    for process in (forked, *forked.children()) if content is not None else ():
        (tmp_path / str(process.pid)).mkdir()
        (tmp_path / str(process.pid) / "smaps_rollup").write_text(content)
    memory = peak_of(forked)
    assert memory.host_bytes > 4 * (64 << 20)
    assert not memory.shared_pages_count_once


def test_memory_of_a_process():
    with MemoryPeak(psutil.Process(os.getpid())) as memory:
        pass
    assert memory.host_bytes > 10**7
    assert (memory.gpu_bytes is None) == (used_gpu_bytes() is None)
