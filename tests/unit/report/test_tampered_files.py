"""Files of a run with any content give a report, or an error with the name of the file; no reader ends in a traceback."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from longhaul.artifacts.atomic_files import file_sha256
from longhaul.artifacts.paths import RunPaths, WeightsFolder
from longhaul.artifacts.typed_json import parse_json
from longhaul.errors import UserError
from longhaul.report import html_page
from longhaul.report.html_page import render_page
from longhaul.report.run_results import read_run
from longhaul.report.status_text import status_view, summary_lines
from tests.support.finished_run_files import STAGE, write_finished_run
from tests.support.tampered_files import DAMAGED_BYTES, tampered_texts


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.setattr(html_page, "get_plotlyjs", lambda: "")
    return write_finished_run(tmp_path / "results")


def weights_of(run: RunPaths) -> WeightsFolder:
    return WeightsFolder(run.stage(STAGE).path / "weights" / "0123")


def artifacts_of(run: RunPaths) -> list[Path]:
    weights = weights_of(run)
    own = [
        run.plan,
        run.environment,
        run.fabric,
        run.scale_test(2),
        run.tokenizer,
        run.manifest("prose"),
        run.stage(STAGE).checkpoint,
    ]
    return [
        *own,
        run.export_manifest(STAGE),
        run.serve_check(STAGE),
        run.evaluation(STAGE, "trained", "quiz"),
        weights.skipped_batches,
        *weights.samples.glob("*.json"),
        weights.profile(0),
    ]


def test_untouched_run_gives_a_report(run: RunPaths):
    page = render_page(read_run(run.folder))
    assert (
        "Stage base" in page and "all_reduce" in page and "within the limits" in page and len(artifacts_of(run)) == 13
    )


def test_no_tampered_artifact_ends_in_a_traceback(run: RunPaths):
    """Each value is replaced and left out once; a refusal names the file."""
    tried = refused = 0
    for path in artifacts_of(run):
        text = path.read_bytes()
        for change, tampered in tampered_texts(text):
            path.write_bytes(tampered)
            tried += 1
            try:
                render_page(read_run(run.folder))
            except UserError as error:
                refused += 1
                assert error.hint, change
            except Exception as error:
                raise AssertionError(f"{path.name}: {change}") from error
        path.write_bytes(text)
    assert tried > 300 and refused > tried / 2


@pytest.mark.parametrize("value", [[], {}, 7, "x"], ids=str)
def test_export_whose_checkpoint_has_no_hash_is_named(run: RunPaths, value: object):
    """Readers look the hash up in sets, which hold no lists."""
    path = run.export_manifest(STAGE)
    content = json.loads(path.read_text())
    content["provenance"]["checkpoint_sha256"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"base\.json .*`provenance\.checkpoint_sha256`"):
        read_run(run.folder)


LINES = (
    *DAMAGED_BYTES,
    b'{"time_s": "x", "event": 1}',
    b'{"event": "saved", "time_s": 1}',
    b'{"event": "start_up", "time_s": 1, "imports_s": 1}',
    b'{"step": "1"}',
    b'{"hosts": 1}',
    b'{"step": 1%s, "loss": 1.0, "hosts": [], "time_s": 1, "event": "saved"}' % (b"0" * 400),
    b'{"step": 7, "loss": 1%s, "hosts": [], "time_s": 1, "event": "x", "seconds": 1}' % (b"0" * 400),
    b'{"step": 7, "loss": 1.0, "hosts": [], "time_s": 1, "event": "x", "unknown": [-1%s]}' % (b"0" * 400),
)


def shown(run: RunPaths) -> tuple[object, ...]:
    """Return what the report shows of the records."""
    (stage,) = read_run(run.folder).stages
    return stage.attempts, stage.metrics.curves, stage.metrics.validation, stage.summary, stage.goodput, stage.start_up


@pytest.mark.parametrize("name", ["attempts", "metrics", "events", "history"])
def test_bad_line_is_left_out_and_named_with_its_number(name: str, run: RunPaths, capfd: pytest.CaptureFixture[str]):
    path = run.stage(STAGE).history if name == "history" else getattr(weights_of(run), name)
    text = path.read_bytes()
    bad_line = len(text.splitlines()) + 1
    complete = shown(run)
    for line in LINES:
        path.write_bytes(text + line + b"\n")
        capfd.readouterr()
        assert shown(run) == complete
        assert f"{path}, line {bad_line}: " in capfd.readouterr().err
        path.write_bytes(text + line)
        assert shown(run) == complete
        assert capfd.readouterr().err == ""  # half a line at the end is usual after a kill


@pytest.mark.parametrize("digits", [308, 400])
def test_long_integers_give_a_report_and_a_status(digits: int, run: RunPaths, capfd: pytest.CaptureFixture[str]):
    """Integers of 309 digits and more are beyond a double: their line is left out and named."""
    number, complete = b"1" * digits, shown(run)
    weights = weights_of(run)
    for path, line in (
        (weights.metrics, b'{"step": %s, "loss": %s, "step_time_s": %s}'),
        (weights.metrics, b'{"step": 9, "loss": %s, "step_time_s": %s, "mfu": %s}'),
        (weights.metrics, b'{"step": 9, "validation_loss": %s, "a": %s, "b": %s}'),
        (weights.attempts, b'{"hosts": ["n1"], "world_size": %s, "epochs": {"prose": %s}, "x": %s}'),
        (weights.events, b'{"time_s": 1, "event": "work_lost", "seconds": %s, "to_step": %s, "x": %s}'),
    ):
        text = path.read_bytes()
        path.write_bytes(text + line % (number, number, number) + b"\n")
        results = read_run(run.folder)
        render_page(results)
        summary_lines(results.status)
        Console(file=io.StringIO()).print(status_view(results.status))
        if digits > 308:
            assert shown(run) == complete
            assert f"{path}, line {len(text.splitlines()) + 1}: " in capfd.readouterr().err
        path.write_bytes(text)


def test_digits_of_a_text_and_of_a_fraction_are_no_long_integer():
    text = json.dumps({"reason": f'"{"1" * 400}', "share": 0})[:-2] + "0." + "1" * 400 + "}"
    assert parse_json(text, dict[str, Any])["share"] == pytest.approx(0.1111111)


def test_report_changes_no_file(run: RunPaths):
    before = {path: file_sha256(path) for path in run.folder.rglob("*") if path.is_file()}
    read_run(run.folder)
    assert before == {path: file_sha256(path) for path in run.folder.rglob("*") if path.is_file()}
