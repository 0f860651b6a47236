"""Runs the scale test on one number of nodes: a short training, its speed against limits and against that on the fewest nodes."""

from __future__ import annotations

import statistics
from pathlib import Path

from longhaul.artifacts.line_record_fields import MetricsRow
from longhaul.artifacts.scale_test_report import ScaleTestReport
from longhaul.config.acceptance_limits import FEWEST_STEPS, step_time_spread
from longhaul.config.scale_test_config import ScaleTest
from longhaul.jobs.kinds.scale_test_job import ScaleTestSpec
from longhaul.train.train_few_steps import MeasuredSteps, train_few_steps

_KEY = "scale_test"


def run(job: ScaleTestSpec) -> None:
    """Train the stage for a few steps, and write job.out, or `<out>.failed.json` beside it when a limit is missed.

    Raises:
        UserError: a limit is missed; rank 0 raises it and lists all of them.
    """
    measured = train_few_steps(job)
    if measured.is_main:
        smallest = ScaleTestReport.read(Path(job.smallest)) if job.smallest else None
        report = scale_test_report(job, measured, smallest)
        print(_summary(report), flush=True)
        report.write_or_raise(
            Path(job.out),
            f"the scale test of stage {job.stage.name} on {_nodes(report)} ({', '.join(report.hosts)}) missed a limit",
            f"look for the cause on these nodes; or change the limit that is named, or set {_KEY}: off, and run again",
        )


def scale_test_report(job: ScaleTestSpec, measured: MeasuredSteps, smallest: ScaleTestReport | None) -> ScaleTestReport:
    """Return what the steps after the warm-up show, and the problems among it."""
    rows = measured.rows[job.warm_up_steps : job.warm_up_steps + FEWEST_STEPS]
    utilisation = _numbers(rows, "gpu_utilisation")
    speed = statistics.median(_numbers(rows, "tokens_per_s")) / job.world_size
    times = _numbers(rows, "step_time_s")
    report = ScaleTestReport(
        problems=[],
        stage=job.stage.name,
        nodes=job.stage.nodes,
        gpus_per_node=job.stage.gpus_per_node,
        steps=len(rows),
        step_time_s=statistics.median(times),
        step_time_spread=step_time_spread(times),
        tokens_per_s_per_rank=speed,
        efficiency=speed / smallest.tokens_per_s_per_rank if smallest else None,
        smallest_nodes=smallest.nodes if smallest else None,
        gpu_utilisation=statistics.median(utilisation) / 100 if utilisation else None,
        gpu_memory_share=measured.gpu_memory_share,
        hosts=measured.hosts,
        limits=job.limits.model_dump(exclude={"nodes", "minutes"}),
        communication_efficiency=measured.communication_efficiency,
    )
    report.problems.extend(scale_test_problems(report, job.limits))
    return report


def scale_test_problems(report: ScaleTestReport, limits: ScaleTest) -> list[str]:
    """Return each limit that is missed, with value, limit and the key that changes it. What is not measured misses none."""
    on = _nodes(report)
    compared = f"speed per rank on {on}, by that on {report.smallest_nodes}"
    maxima = [
        (
            f"spread of the step times on {on}",
            report.step_time_spread,
            "max_step_time_spread",
            limits.max_step_time_spread,
        ),
        (
            f"memory of the fullest GPU on {on}",
            report.gpu_memory_share,
            "max_gpu_memory",
            limits.max_gpu_memory,
        ),
    ]
    minima = [
        (f"GPU utilisation on {on}", report.gpu_utilisation, "min_gpu_utilisation", limits.min_gpu_utilisation),
        (
            f"communication efficiency on {on}",
            report.communication_efficiency,
            "min_communication_efficiency",
            limits.min_communication_efficiency,
        ),
        (compared, report.efficiency, "min_efficiency", limits.min_efficiency),
    ]
    missed = [(*row, "at most") for row in maxima if row[1] is not None and row[1] > row[3]]
    missed += [(*row, "at least") for row in minima if row[1] is not None and row[1] < row[3]]
    return [f"{what}: {value:.1%}, {sign} {limit:.1%} ({_KEY}.{key})" for what, value, key, limit, sign in missed]


def _nodes(report: ScaleTestReport) -> str:
    return f"{report.nodes} node{'s' if report.nodes > 1 else ''}"


def _numbers(rows: list[MetricsRow], key: str) -> list[float]:
    return [float(value) for row in rows if (value := row.get(key)) is not None]  # pyright: ignore[reportArgumentType]


def _summary(report: ScaleTestReport) -> str:
    shares = {
        "spread": report.step_time_spread,
        "efficiency": report.efficiency,
        "GPU utilisation": report.gpu_utilisation,
        "communication efficiency": report.communication_efficiency,
        "GPU memory": report.gpu_memory_share,
    }
    known = "".join(f", {name} {value:.1%}" for name, value in shares.items() if value is not None)
    return (
        f"scale test on {report.nodes} x {report.gpus_per_node} ranks, {report.steps} steps: "
        f"{report.step_time_s:.3f} s per step, "
        f"{report.tokens_per_s_per_rank:,.0f} tokens/s per rank{known}"
    )
