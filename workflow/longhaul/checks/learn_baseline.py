"""Learns the usual rates of a site from a run whose environment check passed, for the file beside the site file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from longhaul.artifacts.artifact_schemas import CheckedNode, EnvironmentReport, failed_path
from longhaul.artifacts.fabric_report import FabricReport
from longhaul.artifacts.job_state import utc_now
from longhaul.artifacts.site_baseline import SiteBaseline, UsualRate, read_baseline
from longhaul.checks.compare_rates_with_limits import RATE_CHECKS, rates_of, usual_of
from longhaul.checks.judge_gpu_pairs import rates_by_path
from longhaul.checks.measurement_types import NodeMeasurements
from longhaul.checks.network_baseline import network_rates
from longhaul.errors import UserError
from longhaul.planning import Plan

_MEASUREMENTS = TypeAdapter(NodeMeasurements)


def learn_baseline(plan: Plan) -> SiteBaseline:
    """Return the usual rates of the nodes, and of the network if the fabric check passed, too.

    Raises:
        UserError: the check has not run, it failed, or it did not measure.
    """
    path = plan.paths.environment
    again = f"run the check: longhaul run {plan.loaded.path} {path}"
    if failed_path(path).exists() and not path.exists():
        raise UserError(
            f"{failed_path(path)}: the environment check failed, so its rates are not those of healthy nodes", again
        )
    if not path.exists():
        raise UserError(f"{path} is missing: the environment check has not run", again)
    report = EnvironmentReport.read(path)
    measured = {node["host"]: _measurements(node, str(path)) for node in report.nodes}
    rates = {check.key: rates_of(check, measured) for check in RATE_CHECKS}
    gpu = _gpu_name(report.nodes)
    known = {key: usual_of(found.values()) for key, found in rates.items() if found}
    pairs = {path: usual_of(found) for path, found in rates_by_path(measured).items()}
    return SiteBaseline(gpu, plan.run, utc_now(), known, _network(plan, gpu), pairs)


def _network(plan: Plan, gpu: str) -> dict[str, UsualRate]:
    """Return the rates of the network; {} if the fabric check has not passed.

    If it accepted something slow, the rates of the earlier baseline stay, if that is of the same GPUs.
    """
    path = plan.paths.fabric
    if not path.exists():
        return {}
    report = FabricReport.read(path)
    if not report.accepted:
        return {rate.name: usual_of(rate.values) for rate in network_rates(report)}
    earlier = read_baseline(plan.loaded.site_path)
    kept = earlier.network if earlier and earlier.gpu == gpu else {}
    stays = "the earlier rates of the network stay" if kept else "no rates of the network are stored"
    print(
        f"warning: {path}: {stays}, as something was slow: {'; '.join(report.accepted)}\n"
        f"  remedy: after the repair, delete {path}, run the check again, and store the rates then"
    )
    return kept


def _measurements(node: CheckedNode, path: str) -> NodeMeasurements:
    found: Any = node.get("measured")
    try:
        return _MEASUREMENTS.validate_python(found)
    except ValidationError:
        raise UserError(
            f"{path}: node {node['host']} has no measurements",
            "another release wrote the file: delete it, and run the environment check again",
        ) from None


def _gpu_name(nodes: Sequence[CheckedNode]) -> str:
    gpus: list[Any] = [gpu for node in nodes for gpu in node["gpus"]]
    return str(gpus[0]["name"]) if gpus else ""


def print_baseline(baseline: SiteBaseline) -> None:
    """Print the usual rates."""
    title = f"Usual rates of {baseline.gpu or 'nodes without GPUs'}, by run {baseline.run}"
    table = Table("rate", "unit", "median", "lowest", "highest", "values", title=title, title_justify="left")
    known = {check.check: (check.unit, baseline.rates.get(check.key)) for check in RATE_CHECKS}
    known |= {f"copies between GPUs, {path}": ("GB/s", rate) for path, rate in baseline.gpu_pairs.items()}
    known |= {name: ("GB/s", rate) for name, rate in baseline.network.items()}
    for name, (unit, rate) in known.items():
        if rate:
            values = (f"{rate[key]:.4g}" for key in ("median", "lowest", "highest"))
            table.add_row(name, unit, *values, str(rate["count"]))
    Console(width=120).print(table)
