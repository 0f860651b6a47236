"""Derives the environment variables of a job: threads, offline mode, network interface, NVLink multicast, flight recorder; each
with its source and reason.

launch.sh sets them, and `longhaul fabric explain` shows them. runtime/rdma_variables.py adds what depends on the adapters of
each node, and scheduling/run_job_steps.py the file names of an attempt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from longhaul.config.site_config import Site
from longhaul.planning.slurm_request import SlurmRequest
from longhaul.runtime.offline import OFFLINE_ENVIRONMENT
from longhaul.runtime.rdma_variables import INTERCONNECT

COLLECTIVE_RECORDS = "TORCH_FR_DUMP_TEMP_FILE"
"""torch's flight recorder writes to this name, with the rank behind it, when a collective of NCCL does not end. The supervisor
sets it for each attempt.
"""
SITE_FILE, PLAN, LONGHAUL = "site file", "plan", "longhaul"
_DUMP_TIME_MS = 60_000
_RECORDED_COLLECTIVES = 2000


@dataclass(frozen=True)
class JobVariable:
    """An environment variable of a job.

    source:       where the value comes from: a key of the site file, the plan, or longhaul itself
    unless_set:   a value that the variable has already, from a module or the user's shell, is kept
    """

    name: str
    value: str
    source: str
    reason: str
    unless_set: bool = False


def job_variables(site: Site, request: SlurmRequest) -> list[JobVariable]:
    """Return the variables that launch.sh sets for a job, each once. The site file's `environment` replaces any other value."""
    found = {variable.name: variable for variable in _derived(site, request)}
    for name, value in site.environment.items():
        found[name] = JobVariable(name, value, f"{SITE_FILE}, environment", "set by hand")
    return list(found.values())


def _derived(site: Site, request: SlurmRequest) -> Iterator[JobVariable]:
    for name, value in OFFLINE_ENVIRONMENT.items():
        yield JobVariable(name, value, LONGHAUL, "jobs never download; `longhaul fetch` did it before")
    yield JobVariable("PYTHONUNBUFFERED", "1", LONGHAUL, "a log shows each line at once")
    yield JobVariable("TOKENIZERS_PARALLELISM", "false", LONGHAUL, "worker processes are forked")
    yield JobVariable("OMP_NUM_THREADS", str(request.cpus_per_task), PLAN, "cores of each rank")
    if not site.node.gpus:
        yield JobVariable("DS_ACCELERATOR", "cpu", SITE_FILE, "the nodes have no GPUs")
    yield from _sockets(site)
    if site.node.gpus:
        yield from _gpu_variables(site, request)


def _sockets(site: Site) -> Iterator[JobVariable]:
    if interface := site.interconnect.socket_interface:
        source = f"{SITE_FILE}, interconnect.socket_interface"
        for library in ("NCCL", "GLOO"):
            yield JobVariable(
                f"{library}_SOCKET_IFNAME", interface, source, f"{library} connects through this interface"
            )


def _gpu_variables(site: Site, request: SlurmRequest) -> Iterator[JobVariable]:
    yield JobVariable(
        INTERCONNECT, site.interconnect.kind, f"{SITE_FILE}, interconnect.kind", "each node chooses its adapters by it"
    )
    if site.accelerator.cuda:
        # torch's own trainers set this, too: https://github.com/pytorch/torchtitan/blob/main/run_train.sh
        reason = "the allocator keeps no holes that are too small for the next pass"
        yield JobVariable("PYTORCH_ALLOC_CONF", "expandable_segments:True", LONGHAUL, reason, True)
        yield from _multicast(site, request)
    for name, (value, reason) in _FLIGHT_RECORDER.items():
        yield JobVariable(name, value, LONGHAUL, reason, True)


def _multicast(site: Site, request: SlurmRequest) -> Iterator[JobVariable]:
    """Yield the variables that switch NVLink multicast off where other jobs may use it.

    A container or virtual machine with a part of a host's GPUs looks like a whole node; only the site file can tell.
    """
    if site.interconnect.nvlink_multicast == "off":
        source, reason = f"{SITE_FILE}, interconnect.nvlink_multicast", "NVLink multicast is off at this site"
        yield from (JobVariable(name, value, source, reason) for name, value in NO_MULTICAST.items())
    elif _shares_nodes(site, request):
        reason = (
            f"{request.gpus_per_node} of {site.node.gpus} GPUs: other jobs may use the node, and NVLink multicast is a "
            "resource of the whole node"
        )
        yield from (JobVariable(name, value, PLAN, reason, True) for name, value in NO_MULTICAST.items())


def _shares_nodes(site: Site, request: SlurmRequest) -> bool:
    """Return whether the job uses several of a node's GPUs, and other jobs may use the rest. A server has one task for all."""
    return 1 < request.gpus_per_node < site.node.gpus and not request.exclusive


NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""The switches of NCCL, of torch's symmetric memory and of NVSHMEM.
https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-nvls-enable
"""
_FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": (str(_RECORDED_COLLECTIVES), "the flight recorder keeps the last collectives of each rank"),
    "TORCH_NCCL_DUMP_ON_TIMEOUT": ("1", "a collective that does not end makes all ranks write what they recorded"),
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": (
        str(_DUMP_TIME_MS),
        "all ranks write to one file system at once; torch's 15 s are short for that",
    ),
}
"""Names and meaning: torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp and FlightRecorder.hpp of torch 2.13."""
