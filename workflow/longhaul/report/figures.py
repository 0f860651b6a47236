"""Plotly figures of a run, as JSON that the page draws."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import plotly.graph_objects as go

from longhaul.report.goodput import Goodput
from longhaul.report.metric_series import Curve, downsample
from longhaul.report.number_format import duration, percent, words
from longhaul.report.run_data import Span, StageRecord

COLOURS = ("#2563a8", "#d97706", "#3f8f5b", "#8b5cb8", "#b4483c")
_LAYOUT: dict[str, Any] = {
    "template": "simple_white",
    "font": {"family": "system-ui, sans-serif", "size": 13},
    "margin": {"l": 60, "r": 20, "t": 40, "b": 45},
    "height": 340,
    "legend": {"orientation": "h", "y": -0.22},
    "hovermode": "x unified",
}


def loss_figure(stage: StageRecord) -> go.Figure:
    """Training and validation loss over steps, with the level that this stage has to beat."""
    figure = _figure(f"{stage.name}: loss, nats per token", "step")
    _line(figure, stage.metrics.curves["loss"], "training", COLOURS[0], width=1)
    _line(figure, stage.metrics.validation, "validation", COLOURS[1], mode="lines+markers")
    level, name = stage.unigram_entropy_nats, "unigram entropy of the data"
    if stage.kind == "sft":
        level, name = stage.summary.first_validation, "validation before this stage"
    if level:
        ends = stage.metrics.curves["loss"].x[:: max(1, stage.metrics.steps - 1)]
        _line(figure, Curve(ends, [level] * len(ends)), name, "#777777", dash="dash")
    return figure


def speed_figure(stage: StageRecord) -> go.Figure:
    """Tokens per second, and the memory of the largest moment so far, over steps."""
    figure = _figure(f"{stage.name}: throughput and memory", "step")
    _line(figure, stage.metrics.curves["tokens_per_s"], "tokens/s", COLOURS[2], width=1)
    memory = stage.metrics.curves["memory_bytes"]
    in_gib = Curve(memory.x, [None if value is None else value / 2**30 for value in memory.y])
    _line(figure, in_gib, "peak memory of a process, GiB", COLOURS[3], yaxis="y2")
    figure.update_layout(
        yaxis={"title": "tokens/s", "rangemode": "tozero"},
        yaxis2={"title": "GiB", "overlaying": "y", "side": "right", "rangemode": "tozero", "tickmode": "auto"},
        margin={**_LAYOUT["margin"], "r": 60},
    )
    return figure


def schedule_figure(stage: StageRecord) -> go.Figure:
    """Learning rate and gradient norm over steps."""
    figure = _figure(f"{stage.name}: learning rate and gradient norm", "step")
    _line(figure, stage.metrics.curves["lr"], "learning rate", COLOURS[0])
    _line(figure, stage.metrics.curves["grad_norm"], "gradient norm", COLOURS[4], yaxis="y2", width=1)
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
    """One bar: what the stage's time went into, from its first submission to its end."""
    figure = _figure(f"Where the time went: {percent(goodput.goodput)} into training that counts", "seconds")
    colours = (*COLOURS, "#9db7d3", "#777777", "#c9b458", "#54b6c4")
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


def timeline_figure(spans: Sequence[Span]) -> go.Figure:
    """When each job of the run worked, in its last try."""
    figure = _figure("When each job worked (its last try)", "")
    figure.add_bar(
        orientation="h",
        y=[span.job for span in spans],
        base=[_utc(span.start_s) for span in spans],
        x=[(span.end_s - span.start_s) * 1000 for span in spans],
        marker_color=[COLOURS[0] if span.job.startswith("train") else "#9db7d3" for span in spans],
        text=[span.duration for span in spans],
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    figure.update_layout(
        xaxis={"type": "date"},
        yaxis={"autorange": "reversed"},
        hovermode="closest",
        height=90 + 28 * len(spans),
        margin={**_LAYOUT["margin"], "l": 160},
    )
    return figure


def fabric_figure(results: Sequence[dict[str, Any]]) -> go.Figure:
    """Bus bandwidth of each collective over message size, both on a logarithmic scale."""
    figure = _figure("Bus bandwidth, GB/s", "bytes")
    for colour, name in zip(COLOURS, dict.fromkeys(row["collective"] for row in results), strict=False):
        rows = [row for row in results if row["collective"] == name]
        curve = Curve([row["bytes"] for row in rows], [row["bus_bandwidth_gbps"] for row in rows])
        _line(figure, curve, name, colour, mode="lines+markers")
    figure.update_layout(xaxis={"type": "log", "title": "bytes"}, yaxis={"type": "log"})
    return figure


def _figure(title: str, x_title: str) -> go.Figure:
    figure = go.Figure(layout=_LAYOUT)
    figure.update_layout(title={"text": title, "font": {"size": 14}}, xaxis={"title": x_title})
    return figure


def _line(
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
        short = downsample(curve)
        line = {"color": colour, "width": width, "dash": dash}
        figure.add_scatter(x=short.x, y=short.y, name=name, mode=mode, line=line, yaxis=yaxis)


def _utc(epoch_s: float) -> str:
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
