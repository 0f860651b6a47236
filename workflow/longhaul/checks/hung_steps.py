"""Names what steps of the checks use, how long a step may take there, and the remedy; writes the rows of hung steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from longhaul.artifacts.node_check_row import CheckRow
from longhaul.checks.build_check_rows import Component
from longhaul.checks.run_parts_in_child import HungStep, Subject

HUNG_STEP = "step that hangs"
GPUS = Subject(
    "GPUs",
    180.0,  # the first call into CUDA takes up to a minute with 8 GPUs
    "exclude the node: drain it, and restart it or let the admins replace the GPU; its kernel log (Xid) may say why",
)
GPU_DRIVER = Subject(
    "driver of the GPUs",
    90.0,  # NVML and amdsmi have 30 s each
    "exclude the node: drain it, and restart it if nvidia-smi, amd-smi or rocm-smi does not return either",
)
RUN_FOLDER = Subject(
    "run folder",
    120.0,  # a busy metadata server answers after some ten seconds
    "exclude the node, or let the admins check its mount of the file system; the kernel log says whether the server answers",
)
SCRATCH = Subject(
    "storage.scratch",
    120.0,
    "exclude the node, or let the admins check the disk and its mount; the kernel log may say why",
)
OPS = Subject(
    "DeepSpeed's ops",
    420.0,  # nvcc takes minutes; the other nodes wait no longer
    "look on the node for a compiler that does not end; exclude the node if it has none",
)
KERNEL = Subject(
    "files of the kernel",
    60.0,
    "exclude the node: a driver does not answer; its kernel log says which one, and a restart may help",
)
COMMANDS = Subject("commands", 60.0, "run the command on the node; exclude the node if it does not return there either")
CONNECTIONS = Subject(
    "connections between ranks",
    600.0,  # the rendezvous waits 190 s and names who is missing; NCCL takes a minute with thousands of ranks
    "read in the job's log what the other ranks do: one that is silent has a broken GPU, or no network to the others",
)
COLLECTIVES_OF_RANKS = Subject(
    "messages between ranks",
    150.0,  # torch's own time-out, 60 s, comes first where its watchdog still runs
    "look for a rank of the job's log that waits elsewhere, or not at all: its GPU or its node is broken; exclude that node",
)


def hung_steps(node: Mapping[str, Any]) -> Sequence[HungStep]:
    """Return the steps of a node's check that did not end. node: facts of node_facts.py"""
    return node.get("hung", ())


def hangs(node: Mapping[str, Any], subject: Subject) -> bool:
    """Return whether a step that uses this did not end, so that its facts are missing."""
    return any(hung.step.subject.name == subject.name for hung in hung_steps(node))


def hung_step_rows(node: Mapping[str, Any]) -> Iterator[CheckRow]:
    """Yield a row per step that did not end; its component are the GPUs that it used."""
    for hung in hung_steps(node):
        step, names = hung.step, node["gpu_names"]
        component = " <-> ".join(names[index] if index < len(names) else f"GPU {index}" for index in step.gpus)
        expected = f"an end within {step.subject.limit_s:g} s"
        yield Component(node["host"], component).row(
            HUNG_STEP, f"{step.text}: {hung.reason}", expected, "fail", step.subject.remedy
        )
