"""Draws the report's Plotly figures: loss, speed, schedule, goodput, timeline of jobs, fabric."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import plotly.graph_objects as go

from longhaul.artifacts.fabric_report import CollectiveResult, PairResult
from longhaul.report.goodput import Goodput
from longhaul.report.metric_series import Curve, downsample
from longhaul.report.number_format import duration, percent, words
from longhaul.report.run_results import JobTimespan, StageResults

COLOURS = ("#2563a8", "#d97706", "#3f8f5b", "#8b5cb8", "#b4483c", "#0f8b8d")
_MOST_NODES_IN_HEAT_MAP = 48
_LAYOUT: dict[str, Any] = {
    "template": "simple_white",
    "font": {"family": "system-ui, sans-serif", "size": 13},
    "margin": {"l": 60, "r": 20, "t": 40, "b": 45},
    "height": 340,
    "legend": {"orientation": "h", "y": -0.22},
    "hovermode": "x unified",
}


def loss_figure(stage: StageResults, first_validation_loss: float | None) -> go.Figure:
    """Return training and validation loss over steps, and a level that the loss should fall below."""
    figure = _figure(f"{stage.name}: loss, nats per token", "step")
    _add_line(figure, stage.metrics.curves["loss"], "training", COLOURS[0], width=1)
    _add_line(figure, stage.metrics.validation, "validation", COLOURS[1], mode="lines+markers")
    level, name = stage.unigram_entropy_nats, "unigram entropy of the data"
    if stage.kind == "sft":
        level, name = first_validation_loss, "validation before this stage"
    if level:
        ends = stage.metrics.curves["loss"].x[:: max(1, stage.metrics.steps - 1)]
        _add_line(figure, Curve(ends, [level] * len(ends)), name, "#777777", dash="dash")
    return figure


def speed_figure(stage: StageResults) -> go.Figure:
    """Return tokens per second and peak memory over steps."""
    figure = _figure(f"{stage.name}: throughput and memory", "step")
    _add_line(figure, stage.metrics.curves["tokens_per_s"], "tokens/s", COLOURS[2], width=1)
    memory = stage.metrics.curves["memory_bytes"]
    in_gib = Curve(memory.x, [None if value is None else value / 2**30 for value in memory.y])
    _add_line(figure, in_gib, "peak memory of a process, GiB", COLOURS[3], yaxis="y2")
    figure.update_layout(
        yaxis={"title": "tokens/s", "rangemode": "tozero"},
        yaxis2={"title": "GiB", "overlaying": "y", "side": "right", "rangemode": "tozero", "tickmode": "auto"},
        margin={**_LAYOUT["margin"], "r": 60},
    )
    return figure


def schedule_figure(stage: StageResults) -> go.Figure:
    """Return learning rate and gradient norm over steps."""
    figure = _figure(f"{stage.name}: learning rate and gradient norm", "step")
    _add_line(figure, stage.metrics.curves["lr"], "learning rate", COLOURS[0])
    _add_line(figure, stage.metrics.curves["grad_norm"], "gradient norm", COLOURS[4], yaxis="y2", width=1)
    figure.update_layout(
        yaxis={"title": "learning rate", "rangemode": "tozero", "exponentformat": "power"},
        yaxis2={
            "title": "gradient norm",
            "overlaying": "y",
            "side": "right",
            "rangemode": "tozero",
            "tickmode": "auto",
        },
        margin={**_LAYOUT["margin"], "r": 60},
    )
    return figure


def goodput_figure(goodput: Goodput) -> go.Figure:
    """Return one bar with the parts of the stage's time, from its first submission to its end."""
    figure = _figure(f"Wall-clock time: {percent(goodput.goodput)} in training steps that were kept", "seconds")
    colours = (*COLOURS[:5], "#9db7d3", "#777777", "#c9b458", "#54b6c4")
    for colour, (name, share) in zip(colours, goodput.shares().items(), strict=True):
        seconds = getattr(goodput, name)
        figure.add_bar(
            orientation="h",
            y=[""],
            x=[seconds],
            name=f"{words(name)}, {percent(share)}",
            marker_color=colour,
            hovertemplate=f"{words(name)}: {duration(seconds)}, {percent(share)}<extra></extra>",
        )
    figure.update_layout(barmode="stack", height=230, hovermode="closest", legend={"orientation": "h", "y": -0.6})
    return figure


def timeline_figure(timespans: Sequence[JobTimespan]) -> go.Figure:
    """Return one bar per job, from the start to the end of its last try."""
    figure = _figure("Start and end of each job's last try", "")
    figure.add_bar(
        orientation="h",
        y=[timespan.job for timespan in timespans],
        base=[_utc(timespan.start_s) for timespan in timespans],
        x=[(timespan.end_s - timespan.start_s) * 1000 for timespan in timespans],
        marker_color=[COLOURS[0] if timespan.job.startswith("train") else "#9db7d3" for timespan in timespans],
        text=[timespan.duration for timespan in timespans],
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    figure.update_layout(
        xaxis={"type": "date"},
        yaxis={"autorange": "reversed"},
        hovermode="closest",
        height=90 + 28 * len(timespans),
        margin={**_LAYOUT["margin"], "l": 160},
    )
    return figure


def fabric_figure(results: Sequence[CollectiveResult]) -> go.Figure:
    """Return bus bandwidth of each collective over message size. Both axes are logarithmic."""
    figure = _figure("Bus bandwidth, GB/s", "bytes")
    between_all = [row for row in results if row["scope"] == "all"]
    for colour, name in zip(COLOURS, dict.fromkeys(row["collective"] for row in between_all), strict=False):
        rows = [row for row in between_all if row["collective"] == name]
        curve = Curve([row["bytes"] for row in rows], [row["bus_bandwidth_gbps"] for row in rows])
        _add_line(figure, curve, name, colour, mode="lines+markers")
    figure.update_layout(xaxis={"type": "log", "title": "bytes"}, yaxis={"type": "log"})
    return figure


def pairs_figure(hosts: Sequence[str], pairs: Sequence[PairResult]) -> go.Figure:
    """Return a heat map of the bandwidth between nodes; of a large network, the nodes with the slowest pairs."""
    shown = _nodes_with_slowest_pairs(hosts, pairs)
    rates = {frozenset(pair["hosts"]): pair["bandwidth_gbps"] for pair in pairs}
    figure = _figure("Bandwidth between two nodes, GB/s in each direction", "")
    figure.add_heatmap(
        x=shown,
        y=shown,
        z=[[rates.get(frozenset((a, b))) if a != b else None for b in shown] for a in shown],
        colorscale="RdYlGn",
        zmin=0,
        hovertemplate="%{x} and %{y}: %{z:.3g} GB/s<extra></extra>",
    )
    figure.update_layout(
        xaxis={"type": "category"},
        yaxis={"type": "category", "autorange": "reversed"},
        hovermode="closest",
        height=260 + 12 * len(shown),
    )
    return figure


def _nodes_with_slowest_pairs(hosts: Sequence[str], pairs: Sequence[PairResult]) -> list[str]:
    """Return the nodes that the heat map shows, in the order of `hosts`."""
    by_rate = sorted(pairs, key=lambda pair: pair["bandwidth_gbps"])
    worst = dict.fromkeys(host for pair in by_rate for host in pair["hosts"])
    chosen = set(list(worst)[:_MOST_NODES_IN_HEAT_MAP])
    return [host for host in hosts if host in chosen]


def _figure(title: str, x_title: str) -> go.Figure:
    figure = go.Figure(layout=_LAYOUT)
    figure.update_layout(title={"text": title, "font": {"size": 14}}, xaxis={"title": x_title})
    return figure


def _add_line(
    figure: go.Figure,
    curve: Curve,
    name: str,
    colour: str,
    mode: str = "lines",
    width: float = 2,
    yaxis: str = "y",
    dash: str = "solid",
) -> None:
    if curve:
        points = downsample(curve)
        line = {"color": colour, "width": width, "dash": dash}
        figure.add_scatter(x=points.x, y=points.y, name=name, mode=mode, line=line, yaxis=yaxis)


def _utc(epoch_s: float) -> str:
    """Return seconds since 1970 as an ISO date and time without the offset of UTC, as Plotly expects."""
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
