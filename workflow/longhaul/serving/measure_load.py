"""Sends requests at the same time, compares every answer with the one to the same prompt alone, and measures times and memory."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil

from longhaul.artifacts.serve_check_result import LoadStep
from longhaul.errors import UserError
from longhaul.serving.ask_server import Answer, Connection, Prompt
from longhaul.serving.compare_answers import changed_answer, largest_difference

_SAMPLING_S = 0.5
_PROC = Path("/proc")


async def answers_alone(connection: Connection, prompts: Sequence[Prompt], most_tokens: int) -> list[Answer]:
    """Return the answer to each prompt, one request after the other."""
    return [await connection.answer(prompt, most_tokens) for prompt in prompts]


async def measure_load(
    connection: Connection, prompts: Sequence[Prompt], alone: Sequence[Answer], most_tokens: int, largest: float
) -> LoadStep:
    """Send all prompts at the same time, and return what was measured.

    alone:   the answers to the same prompts, one after the other
    largest: accepted difference of log probabilities

    Raises:
        UserError: an answer was lost, or is the answer to another prompt.
    """
    start = time.monotonic()
    loaded = await asyncio.gather(*(connection.answer(prompt, most_tokens) for prompt in prompts))
    duration_s = time.monotonic() - start
    for number, (one, other) in enumerate(zip(alone, loaded, strict=True), start=1):
        if difference := changed_answer(one, other, largest):
            raise UserError(
                f"with {len(prompts)} requests at the same time, answer {number} is not the answer to its prompt: {difference}",
                "do not use this engine for this model under load",
            )
    first_s = [answer.arrived_s[0] for answer in loaded if answer.arrived_s]
    gaps_s = [later - earlier for answer in loaded for earlier, later in pairwise(answer.arrived_s)]
    return LoadStep(
        streams=len(prompts),
        tokens=sum(answer.count for answer in loaded),
        tokens_per_s=sum(answer.count for answer in loaded) / duration_s,
        first_token_median_s=_quantile(first_s, 0.5),
        first_token_p99_s=_quantile(first_s, 0.99),
        inter_token_median_s=_quantile(gaps_s, 0.5),
        inter_token_p99_s=_quantile(gaps_s, 0.99),
        largest_difference=largest_difference(alone, loaded),
    )


def _quantile(values: Sequence[float], share: float) -> float | None:
    return float(np.quantile(values, share)) if values else None


def distinct_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return `count` prompts made of the given ones by moving their beginnings to their ends; distinct as far as possible.

    Distinct prompts have distinct answers, so an answer that reaches the wrong client is noticed.
    """
    rotated = [_rotate(prompt, places) for places in range(count) for prompt in prompts]
    unique = list({str(prompt): prompt for prompt in rotated}.values())
    return [unique[number % len(unique)] for number in range(count)]


def _rotate(prompt: Prompt, places: int) -> Prompt:
    if isinstance(prompt, list):
        places %= len(prompt)
        return prompt[places:] + prompt[:places]
    words = prompt.split(" ")
    places %= len(words)
    return " ".join(words[places:] + words[:places])


class MemoryPeak:
    """Measures the largest memory of a process and all below it, and of the node's GPUs, during a `with` block.

    host_bytes: resident memory
    shared_pages_count_once: a page that several processes share counts once; False: for each of them
    gpu_bytes:  used memory of all GPUs that this job may use; None without one
    """

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.host_bytes = 0
        self.shared_pages_count_once = True
        self.gpu_bytes: int | None = None

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self._sample_host()
            if (used := used_gpu_bytes()) is not None:
                self.gpu_bytes = max(self.gpu_bytes or 0, used)
            if self._ended.wait(_SAMPLING_S):
                return

    def _sample_host(self) -> None:
        total, counts_once = 0, True
        for process in (self._process, *self._process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                resident, is_share = _resident_bytes(process)
                total += resident
                counts_once = counts_once and (is_share or not resident)  # a zombie has no memory
        if total > self.host_bytes:
            self.host_bytes, self.shared_pages_count_once = total, counts_once


def _resident_bytes(process: psutil.Process) -> tuple[int, bool]:
    """Return the resident memory of a process, and whether it is its share of the pages (PSS in smaps_rollup), not all (RSS).

    Raises:
        psutil.NoSuchProcess: the process has ended.
    """
    try:
        lines = (_PROC / str(process.pid) / "smaps_rollup").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["Pss"].split()[0]) * 1024, True
    except (OSError, KeyError):  # another user's process, or a kernel without this file
        return process.memory_info().rss, False


def used_gpu_bytes() -> int | None:
    """Return the used memory of the GPUs in CUDA_VISIBLE_DEVICES, else of all; None without NVML or a GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        handles = [_gpu_handle(name) for name in visible or map(str, range(pynvml.nvmlDeviceGetCount()))]
        return sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles) if handles else None
    except pynvml.NVMLError:
        return None


def _gpu_handle(name: str) -> object:
    import pynvml

    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(name)
