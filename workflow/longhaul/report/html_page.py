"""One self-contained HTML page about a run: no file beside it, no network, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from longhaul import __version__
from longhaul.artifacts.files import write_text
from longhaul.artifacts.schemas import Export
from longhaul.config.package_data import data_root
from longhaul.report import figures
from longhaul.report import number_format as text
from longhaul.report.run_data import RunRecord, StageRecord, read_run

TEMPLATES = data_root() / "templates" / "report"


def run(folder: Path, out: Path) -> None:
    """Writes the page about `results/<run>`; UserError when an artefact is missing."""
    write_text(out, render_page(read_run(folder)))


def render_page(record: RunRecord) -> str:
    """The page as HTML. Values from the run are escaped; only figures are put in as they are."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(text, name) for name in ("count", "size", "nats", "percent", "duration", "words", "plain")
    }
    return environment.get_template("report.html.j2").render(
        record=record,
        stages=[_stage_rows(stage) for stage in record.stages],
        exports=[_proof_rows(export) for export in record.exports],
        timeline=_embedded(figures.timeline_figure(record.spans)) if record.spans else "",
        fabric=_embedded(figures.fabric_figure(record.fabric.results)) if record.fabric.results else "",
        # the library is put in whole, so that the page works where there is no internet
        plotly=Markup(get_plotlyjs()),
        version=__version__,
    )


def _stage_rows(stage: StageRecord) -> dict[str, Any]:
    """A stage's headline numbers and figures."""
    summary = stage.summary
    numbers = {
        "steps": text.count(stage.checkpoint.steps),
        "last training loss": text.nats(summary.last_loss),
        "validation loss, start → end": f"{text.nats(summary.first_validation)} → {text.nats(summary.last_validation)}",
        "best validation loss": f"{text.nats(summary.best_validation)} at step {text.count(summary.best_validation_step)}",
        "unigram entropy of the data": text.nats(stage.unigram_entropy_nats),
        "tokens/s, median": text.count(summary.median_tokens_per_s),
        "step time, median": text.duration(summary.median_step_time_s),
        "model FLOPs utilisation, median": text.percent(summary.median_mfu),
        "data wait": text.percent(summary.data_wait_share),
        "padding of the packs": text.percent(stage.padding_share),
        "memory planned for a GPU": text.size(stage.planned_memory_bytes),
        "peak memory of a GPU, or of a process without one": text.size(summary.peak_memory_bytes),
        "batches left out after a bad step": text.count(stage.skipped_batches),
        "trained for": text.duration(summary.training_time_s),
        "legs": text.count(len(stage.legs)),
        "hosts": ", ".join(stage.hosts),
    }
    drawn = [draw(stage) for draw in (figures.loss_figure, figures.speed_figure, figures.schedule_figure)]
    if stage.goodput and stage.goodput.total:
        numbers["goodput"] = text.percent(stage.goodput.goodput)
        drawn.append(figures.goodput_figure(stage.goodput))
    return {"name": stage.name, "numbers": numbers, "figures": [_embedded(figure) for figure in drawn]}


def _proof_rows(export: Export) -> dict[str, Any]:
    proof = {
        f"{part}: {text.words(key)}": text.plain(value)
        for part, found in export.proof.items()
        for key, value in found.items()
    }
    return {"export": export, "proof": proof, "provenance": export.provenance}


def _embedded(figure: go.Figure) -> Markup:
    """A figure's JSON for a script element: no `<` in it can end the element."""
    data = str(figure.to_json()).replace("<", "\\u003c")
    return Markup(f'<div class="figure"><script type="application/json">{data}</script></div>')
