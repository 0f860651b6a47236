"""Prints the variables of training jobs for `longhaul fabric explain`: value, source and reason; which ones the shell replaces,
what each node adds, and what is left to NCCL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longhaul.artifacts.paths import STAGE_KIND, JobId
from longhaul.jobs.environment_variables import COLLECTIVE_RECORDS, JobVariable, job_variables
from longhaul.jobs.job_kind import job_request
from longhaul.planning import Plan
from longhaul.runtime.rdma_variables import LINK_LAYERS, NCCL_OF_TORCH, RdmaPort, rdma_variables

_SHELL = "this shell"
_NETWORK_PREFIXES = ("NCCL_", "RCCL_", "TORCH_NCCL_", "TORCH_FR_", "GLOO_", "NVSHMEM_", "FI_", "UCX_")
_WIDTH = 160
_LEFT_TO_NCCL = {
    "NCCL_P2P_DISABLE, NCCL_P2P_LEVEL": "NCCL tests which GPUs reach each other's memory directly",
    "NCCL_NVLS_ENABLE": "on whole nodes, NCCL uses NVLink multicast where the switches have it",
    "NCCL_IB_GID_INDEX": "since 2.21, NCCL takes the GID of RoCE version 2 that fits the address family",
    "NCCL_IB_TIMEOUT, NCCL_IB_RETRY_CNT": "a centre's guide may ask for larger ones: set them in `environment`",
    "NCCL_ALGO, NCCL_PROTO": "NCCL chooses them by message size and topology",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "torch ends a process whose watchdog thread stands still for 480 s",
}
"""Variables that longhaul does not set -> why. The time-out of collectives is recovery.collective_timeout_s, and no variable."""
_ADVICE = {
    "NCCL_BLOCKING_WAIT": "a name that torch has deprecated; the CPU waits for every collective: remove it",
    "NCCL_ASYNC_ERROR_HANDLING": "a name that torch has deprecated; the default of the new one is right: remove it",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "torch's name is TORCH_FR_BUFFER_SIZE now",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "torch's name is TORCH_FR_DUMP_TEMP_FILE now",
    "NCCL_IB_DISABLE": "1 makes NCCL use sockets, which are slow between nodes: remove it, unless the network is Ethernet",
}
"""Variable -> advice."""


class ExplainedVariable(NamedTuple):
    """One line of the table. An empty value: the variable is not set."""

    name: str
    value: str
    source: str
    reason: str


def explained_variables(
    plan: Plan, stage: str, environ: Mapping[str, str], ports: Sequence[RdmaPort]
) -> list[ExplainedVariable]:
    """Return the variables of a stage's training job.

    environ: the environment that jobs inherit
    ports:   the active RDMA ports of this machine
    """
    job = JobId(STAGE_KIND, (stage,))
    rows = [_of_job(variable, environ) for variable in job_variables(plan.site, job_request(plan, job))]
    if plan.site.node.gpus:
        rows += _of_nodes(plan, environ, ports)
        logs = plan.paths.attempt_logs(job)
        files = f"{logs.collective_record_prefix(logs.log(1))}<rank>"
        reason = "files of the flight recorder, here of the first attempt; `longhaul doctor` reads them"
        rows.append(ExplainedVariable(COLLECTIVE_RECORDS, files, "longhaul", reason))
    known = {row.name for row in rows}
    inherited = sorted(name for name in environ if name.startswith(_NETWORK_PREFIXES) and name not in known)
    rows += [
        ExplainedVariable(name, environ[name], _SHELL, _ADVICE.get(name) or "jobs inherit it") for name in inherited
    ]
    if plan.site.node.gpus:
        known = {row.name for row in rows}
        rows += [ExplainedVariable(name, "", "NCCL", why) for name, why in _LEFT_TO_NCCL.items() if name not in known]
    return rows


def print_explained_variables(plan: Plan, environ: Mapping[str, str], ports: Sequence[RdmaPort]) -> None:
    """Print one table for the stages whose jobs get the same variables."""
    by_rows: dict[tuple[ExplainedVariable, ...], list[str]] = {}
    for stage in plan.stages:
        name = stage.stage.name
        by_rows.setdefault(tuple(explained_variables(plan, name, environ, ports)), []).append(name)
    console = Console(width=_WIDTH, highlight=False)
    for rows, stages in by_rows.items():
        table = Table(title=f"Environment of the training of {', '.join(stages)}", title_justify="left")
        for column in ("variable", "value", "from", "reason"):
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(row.name, escape(row.value) or "not set", row.source, escape(row.reason))
        console.print(table)


def _of_job(variable: JobVariable, environ: Mapping[str, str]) -> ExplainedVariable:
    name, value = variable.name, variable.value
    if variable.unless_set and name in environ:
        reason = f"it was set before longhaul, which would set {value}: {variable.reason}"
        return ExplainedVariable(name, environ[name], _SHELL, reason)
    return ExplainedVariable(name, value, variable.source, _ADVICE.get(name) or variable.reason)


def _of_nodes(plan: Plan, environ: Mapping[str, str], ports: Sequence[RdmaPort]) -> list[ExplainedVariable]:
    """Return what ranks derive from the ports of their node; this machine's ports stand for a node's, if it has any."""
    kind = plan.site.interconnect.kind
    taken = {**environ, **plan.site.environment}
    if kind not in LINK_LAYERS or "NCCL_IB_HCA" in taken:
        return []
    derived = rdma_variables(kind, ports, NCCL_OF_TORCH)
    if derived:
        return [
            ExplainedVariable(name, value, "this host's ports", reason) for name, (value, reason) in derived.items()
        ]
    where = "this host has ports of one kind only" if ports else "each node decides by its ports"
    reason = f"{where}; set if a node also has ports that are not {LINK_LAYERS[kind]}"
    return [ExplainedVariable("NCCL_IB_HCA", "", "ports of the node", reason)]
