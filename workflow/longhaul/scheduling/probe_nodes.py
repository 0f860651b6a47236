"""Short jobs that print what a node of a partition has: GPUs with their memory and driver, cores, host memory, interfaces."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longhaul.artifacts.shared_file_system import exists_on_server
from longhaul.config.shipped_files import data_root
from longhaul.errors import UserError, printable
from longhaul.jobs.slurm_reasons import certainly_never_starts, remedy_of
from longhaul.planning.slurm_request import SlurmRequest
from longhaul.scheduling import slurm_client
from longhaul.scheduling.sbatch_refusals import ASK_AGAIN, read_refusal

SCRIPT = data_root() / "templates" / "sbatch" / "probe_node.sh"
_POLL_INTERVAL_S = 2.0
_OUTPUT_WAIT_S = 60.0
"""Longest time after a job's end until its output is complete on this host."""
_LAST_LINE = "end: probe"
_WAIT_LONGER = "try again later, or wait longer with --wait-minutes; the job was cancelled"


@dataclass(frozen=True)
class FoundNode:
    """Facts about a node that a probe job found.

    cpus:       cores of the node that Slurm gave to the job
    gpu_names, gpu_memory_mib: of each GPU that the job may use
    toolkit:    by the vendor of the GPUs; None without GPUs
    version:    newest CUDA that the driver supports, or the installed ROCm; None if not known
    rdma_ports: link layers of the active ports: InfiniBand, or Ethernet for RoCE
    """

    host: str
    cpus: int
    memory_mib: int
    gpu_names: tuple[str, ...]
    gpu_memory_mib: tuple[int, ...]
    toolkit: Literal["cuda", "rocm"] | None
    version: str | None
    interfaces: tuple[str, ...]
    rdma_ports: tuple[str, ...]

    @property
    def gpu_memory_gib(self) -> float | None:
        """Memory of the smallest GPU in GiB, rounded down; None without GPUs."""
        return int(min(self.gpu_memory_mib) / 102.4) / 10 if self.gpu_memory_mib else None


@dataclass(frozen=True)
class ProbeAnswer:
    """The end of one probe job: what it found, or why it found nothing."""

    node: FoundNode | None
    problem: str = ""
    remedy: str = ""


def probe_nodes(requests: Mapping[str, SlurmRequest], wait_minutes: float) -> dict[str, ProbeAnswer]:
    """Submit one probe job per request, wait for them, and return what they found.

    Jobs that have not ended after `wait_minutes`, or at Ctrl-C, are cancelled. The jobs write into the working folder, which
    compute nodes must see.
    """
    with tempfile.TemporaryDirectory(prefix="longhaul-probe-", dir=Path.cwd()) as folder:
        outputs = {title: Path(folder) / f"{number}.txt" for number, title in enumerate(requests)}
        jobs, answers = _submit_each(requests, outputs)
        unfinished = _wait(jobs, time.monotonic() + 60 * wait_minutes)
        answers |= {title: unfinished.get(title) or _answer(job, outputs[title]) for title, job in jobs.items()}
        return {title: answers[title] for title in requests}


def _submit_each(
    requests: Mapping[str, SlurmRequest], outputs: Mapping[str, Path]
) -> tuple[dict[str, str], dict[str, ProbeAnswer]]:
    """Return the ids of the submitted jobs, and the answers for the refused ones. Ctrl-C cancels those that are submitted."""
    jobs: dict[str, str] = {}
    answers: dict[str, ProbeAnswer] = {}
    try:
        for title, request in requests.items():
            try:
                jobs[title] = _submit(request, outputs[title])
            except slurm_client.SlurmCommandError as error:
                refusal = read_refusal(str(error), ASK_AGAIN)
                answers[title] = ProbeAnswer(None, f"refused: {refusal.reason}", refusal.remedy)
    except BaseException:
        slurm_client.cancel(list(jobs.values()))
        raise
    return jobs, answers


def _submit(request: SlurmRequest, output: Path) -> str:
    job = slurm_client.submit([*request.options(), f"--output={output}", "--job-name=longhaul-probe"], SCRIPT)
    print(f"submitted probe job {job} to {request.partition or 'the partition that Slurm chooses'}", flush=True)
    return job


def _wait(jobs: Mapping[str, str], deadline: float) -> dict[str, ProbeAnswer]:
    """Wait until every job has ended. Return the answer for each job that did not end, and cancel it."""
    left, unfinished = dict(jobs), {}
    states: dict[str, str] = {}
    try:
        while left:
            for title, job in list(left.items()):
                has_ended, state = _state(job)
                last_state, states[title] = states.get(title), state
                if has_ended:
                    del left[title]
                elif certainly_never_starts(state, last_state):
                    unfinished[title] = ProbeAnswer(None, f"job {job} cannot start: {state}", remedy_of(state))
                elif time.monotonic() > deadline:
                    unfinished[title] = ProbeAnswer(None, f"job {job} did not end in time: {state}", _WAIT_LONGER)
            left = {title: job for title, job in left.items() if title not in unfinished}
            if left:
                time.sleep(_POLL_INTERVAL_S)
    finally:
        slurm_client.cancel([jobs[title] for title in (*left, *unfinished)])
    return unfinished


def _state(job: str) -> tuple[bool, str]:
    """Return whether a job has ended, and its state with Slurm's reason."""
    try:
        info = slurm_client.job_info(job)
    except (slurm_client.SlurmCommandError, UserError) as error:
        return False, str(error)
    return (True, "") if info is None or info.has_ended else (False, f"{info.state}, {info.reason}")


def _answer(job: str, output: Path) -> ProbeAnswer:
    """Return what the job printed. Its file may appear late on this host."""
    deadline = time.monotonic() + _OUTPUT_WAIT_S
    text = ""
    while _LAST_LINE not in text and time.monotonic() < deadline:
        if exists_on_server(output, 1.0):
            text = output.read_text(encoding="utf-8", errors="replace")
        elif not output.parent.exists():
            break
        if _LAST_LINE not in text:
            time.sleep(0.5)
    if _LAST_LINE in text:
        return ProbeAnswer(parse_probe(text))
    said = text.strip().splitlines()[-1:] or ["it printed nothing"]
    remedy = "call this in a folder that compute nodes see; scontrol show job shows how the job ended"
    return ProbeAnswer(None, f"job {job} ended without a result: {said[0]}", remedy)


def parse_probe(text: str) -> FoundNode:
    """Return what templates/sbatch/probe_node.sh printed."""
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(": ")
        if colon:
            values.setdefault(key, []).append(printable(value.strip()))
    nvidia = _nvidia_gpus(values.get("nvidia", []))
    amd = _gpus_of_amd_smi(values.get("amd_smi", [])) or _gpus_of_rocm_smi(values.get("rocm_smi", []))
    gpus = nvidia or amd
    toolkit = "cuda" if nvidia else "rocm" if amd else None
    versions = [re.match(r"\d+\.\d+", text) for text in values.get(toolkit or "", [])]
    return FoundNode(
        host=values.get("host", [""])[0],
        cpus=_number(values.get("cpus")),
        memory_mib=_number(values.get("memory_kib")) // 1024,
        gpu_names=tuple(name for name, _ in gpus),
        gpu_memory_mib=tuple(memory for _, memory in gpus),
        toolkit=toolkit,
        version=next((match[0] for match in versions if match), None),
        interfaces=tuple(values.get("interface", [])),
        rdma_ports=tuple(values.get("rdma_port", [])),
    )


def _number(found: list[str] | None) -> int:
    return int(found[0]) if found and found[0].isdigit() else 0


def _nvidia_gpus(lines: Sequence[str]) -> list[tuple[str, int]]:
    """Return name and MiB of each GPU: `NVIDIA H200, 143771 MiB, 580.159.04`."""
    found = [re.fullmatch(r"(.+), (\d+) MiB, .*", line) for line in lines]
    return [(match[1], int(match[2])) for match in found if match]


def _gpus_of_amd_smi(lines: Sequence[str]) -> list[tuple[str, int]]:
    """Return name and MiB of each GPU in the JSON of `amd-smi static --asic --vram`; [] if it printed an error instead.

    ROCm 6 prints a list, ROCm 7 an object with this list. Parts of a GPU that is divided have no memory of their own.
    """
    for number, line in enumerate(lines):
        if line.startswith(("[", "{")):  # the JSON, or a warning before it
            with suppress(ValueError, KeyError, TypeError):
                found = json.JSONDecoder().raw_decode("\n".join(lines[number:]))[0]
                gpus = found["gpu_data"] if isinstance(found, dict) else found
                sizes = [(str(gpu["asic"]["market_name"]), gpu["vram"]["size"]) for gpu in gpus]
                known = [(name, size.get("value")) for name, size in sizes if isinstance(size, dict)]  # else "N/A"
                return [(name, value) for name, value in known if isinstance(value, int)]
    return []


def _gpus_of_rocm_smi(lines: Sequence[str]) -> list[tuple[str, int]]:
    """Return name and MiB of each GPU in rocm-smi's CSV. The capitals of its header differ between versions."""
    rows = csv.DictReader(io.StringIO("\n".join(lines)))
    lower = [{(key or "").lower(): value for key, value in row.items()} for row in rows]
    found = [(row.get("card series") or row.get("device", ""), row.get("vram total memory (b)") or "") for row in lower]
    return [(name, int(memory) // 2**20) for name, memory in found if memory.isdigit()]
