"""A browser shows the whole report, with all figures, without errors, and without running text of the run as code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page
from transformers import AutoTokenizer

from longhaul.artifacts.artifact_schemas import DataManifest
from longhaul.data.shards.shard_reader import SplitReader
from longhaul.report.number_format import size
from tests.support.browser import headless_browser, installed_browser
from tests.support.pipeline_run import PipelineRun

SECTIONS = [
    "summary",
    "plan",
    "environment",
    "fabric",
    "scale-test",
    "data",
    "timeline",
    "samples",
    "verification",
    "provenance",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Yield a headless Chromium of the system."""
    program = installed_browser()
    if not program:
        pytest.skip("not installed: chromium (make test-packages)")
    with headless_browser(program) as browser:
        yield browser


class OpenedPage:
    """An opened page, with its console messages and its requests."""

    def __init__(self, browser: Browser, path: Path) -> None:
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.console_messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.console_messages.append(message.text))
        self.page.on("pageerror", lambda error: self.console_messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(".main-svg")


@pytest.fixture(scope="module")
def report(browser: Browser, finished: PipelineRun) -> OpenedPage:
    return OpenedPage(browser, finished.results / "report.html")


def test_page_needs_no_other_file_and_no_network(report: OpenedPage, finished: PipelineRun):
    assert report.console_messages == []
    assert [url for url in report.requests if not url.startswith(("data:", "blob:"))] == [
        (finished.results / "report.html").as_uri()
    ]


def test_every_section_has_content(report: OpenedPage):
    for section in [*SECTIONS, "stage-base", "stage-chat"]:
        text = report.page.inner_text(f"#{section}")
        assert len(text.splitlines()) > 2, section
        assert "None" not in text and "nan" not in text.lower().split(), (section, text)


def test_every_curve_is_drawn_with_its_reference_level(report: OpenedPage):
    for stage, level in (("base", "unigram entropy of the data"), ("chat", "validation before this stage")):
        figures = report.page.query_selector_all(f"#stage-{stage} .js-plotly-plot")
        assert len(figures) == 4
        assert "training steps that were kept" in (figures[3].text_content() or "")
        legend = figures[0].query_selector_all(".legendtext")
        assert [entry.text_content() for entry in legend] == ["training", "validation", level]
        assert len(figures[0].query_selector_all(".scatterlayer .js-line")) == 3
    bars = report.page.query_selector_all("#timeline .bars .point")
    assert len(bars) >= 8


def test_numbers_equal_those_of_the_run(report: OpenedPage, finished: PipelineRun):
    rows = [json.loads(line) for line in (finished.weights("base") / "metrics.jsonl").open()]
    last = [row["validation_loss"] for row in rows if "validation_loss" in row][-1]
    assert f"{last:.3f}" in report.page.inner_text("#stage-base")
    planned = json.loads((finished.results / "plan.json").read_text())["stages"][0]["memory_per_gpu_gib"]["total"]
    assert f"planned memory per GPU\n{size(planned * 2**30)}" in report.page.inner_text("#stage-base")
    verification = finished.read("export/base.json")["verification"]
    assert str(verification["tensors"]["count"]) in report.page.inner_text("#verification")


def test_tables_of_the_summary_are_not_cut_off(report: OpenedPage):
    """The path of an export holds a hash, and wraps."""
    widths = "Array.from(document.querySelectorAll('#summary .wide'), e => [e.scrollWidth, e.clientWidth])"
    found = report.page.evaluate(widths)
    assert len(found) == 2 and all(scroll <= client for scroll, client in found)


def test_summary_says_whether_each_stage_learned_and_where_its_model_is(report: OpenedPage, finished: PipelineRun):
    """The values are those of `longhaul status`."""
    command = [sys.executable, "-m", "longhaul", "status", "results/tiny", "--json"]
    done = subprocess.run(
        command, check=True, cwd=finished.folder, env=finished.environment(), capture_output=True, text=True
    )
    status = json.loads(done.stdout)
    text = report.page.inner_text("#summary")
    assert f"The run is {status['state']}." in text
    for stage in status["stages"]:
        progress = stage["progress"]
        assert f"{progress['first_loss']:.3f} → {progress['loss']:.3f}" in text
        assert f"{progress['first_validation_loss']:.3f} → {progress['validation_loss']:.3f}" in text
        assert stage["exported_to"] in text
    assert "below" in text and "not\u00a0measured" in text  # one word for the browser, so that it is not broken


def test_narrow_dark_page_needs_no_horizontal_scrolling(browser: Browser, report: OpenedPage, finished: PipelineRun):
    page = browser.new_page(viewport={"width": 420, "height": 900}, color_scheme="dark")
    page.goto((finished.results / "report.html").as_uri())
    page.wait_for_selector(".main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") == 420
    cells = page.query_selector_all("#summary td")
    assert cells and all((cell.bounding_box() or {"x": 999, "width": 0})["x"] < 420 for cell in cells)
    label_widths = page.evaluate(
        "[...document.querySelectorAll('#summary td[data-title=definition]')]"
        ".map(cell => getComputedStyle(cell, '::before').width)"
    )
    assert len(label_widths) > 5 and len(set(label_widths)) == 1, "no label is broken, however long its text"
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    assert colours == ["rgb(223, 230, 238)", "rgb(18, 24, 31)"]
    page.close()


def test_report_of_an_unfinished_run_says_what_is_missing(browser: Browser, finished: PipelineRun, tmp_path: Path):
    results = tmp_path / "tiny"
    results.mkdir()
    for name in ("plan.json", "config.yaml"):
        shutil.copy(finished.results / name, results / name)
    command = [sys.executable, "-m", "longhaul", "report", str(results), "--out", str(tmp_path / "page.html")]
    subprocess.run(command, check=True, cwd=finished.folder, env=finished.environment())
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    text = page.inner_text("main")
    for expected in (
        "The run is not started.",
        "No stage has begun to train.",
        "The nodes have not been checked yet.",
        "The network has not been measured yet.",
        "There is no tokenizer yet.",
        "No dataset has been tokenized yet.",
        "No job has ended yet.",
        "Nothing was exported.",
    ):
        assert expected in text
    page.close()


def test_a_length_in_epochs_is_counted_in_packs(finished: PipelineRun):
    """0.4 epochs of P packs are 0.4 * P / 8 steps, rounded up. The report shows the epochs that these steps are."""
    weights = finished.weights("chat")
    (totals,) = [json.loads(path.read_text()) for path in weights.glob("samples/pack-*-train-*.json")]
    steps = -(-4 * totals["packs"] // 80)
    assert steps > 1 and finished.read("stages/chat/checkpoint.json")["steps"] == steps
    assert json.loads((weights / "identity.json").read_text())["steps"] == steps
    assert f"chats {steps * 8 / totals['packs']:.2f}" in (finished.results / "report.html").read_text()
    assert f"{steps} of {steps}" in (finished.results / "report.html").read_text()


def test_metrics_hold_the_padding_the_cuts_and_the_wait_for_data(finished: PipelineRun):
    """The share of cut loss tokens is that of the packs; a stage of texts cuts nothing."""
    weights = finished.weights("chat")
    (totals,) = [json.loads(path.read_text()) for path in weights.glob("samples/pack-*-train-*.json")]
    rows = [json.loads(line) for line in (weights / "metrics.jsonl").open()]
    steps = [row for row in rows if "loss" in row]
    cut = totals["cut_loss_tokens"] / totals["loss_tokens"]
    assert {row["cut_loss_share"] for row in steps} == {round(cut, 6)}
    assert all(0 <= row["padding_share"] < 1 and row["data_wait_s"] >= 0 for row in steps)
    base = [json.loads(line) for line in (finished.weights("base") / "metrics.jsonl").open()]
    assert base and not any("cut_loss_share" in row for row in base)


def test_sample_prompts_are_beginnings_of_validation_documents(finished: PipelineRun):
    tokenizer = AutoTokenizer.from_pretrained(finished.folder / finished.read("export/chat.json")["path"])
    for stage, dataset in (("base", "prose"), ("chat", "chats")):
        manifest = DataManifest.read(finished.results / "data" / f"{dataset}.json")
        held_out = SplitReader(finished.folder / manifest.path, manifest.splits["validation"], dataset == "chats")
        texts = [tokenizer.decode(held_out.document(number)[0]) for number in range(held_out.document_count)]
        samples = finished.read(f"export/{stage}.json")["samples"]
        prompts = {sample["prompt"] for sample in samples}
        assert 1 < len(prompts) == len(samples) and {sample["split"] for sample in samples} == {"validation"}
        assert all(any(text.startswith(prompt) and text != prompt for text in texts) for prompt in prompts)
        if stage == "chat":
            assert all("What follows" in prompt and "After" not in prompt for prompt in prompts)


def test_text_of_a_run_is_escaped(browser: Browser, finished: PipelineRun, tmp_path: Path):
    """A model may generate <script>. A tokenizer's template or a host name may contain it, too."""
    results = tmp_path / "tiny"
    shutil.copytree(
        finished.results, results, symlinks=True, ignore=shutil.ignore_patterns("checkpoints", "*.safetensors")
    )
    attack = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    export = json.loads((results / "export" / "base.json").read_text())
    export["samples"] = [{"prompt": attack, "split": "validation", "completion": attack, "ended_with_eos": True}]
    (results / "export" / "base.json").write_text(json.dumps(export))
    (results / "config.yaml").write_text(attack)
    command = [sys.executable, "-m", "longhaul", "report", str(results), "--out", str(tmp_path / "page.html")]
    subprocess.run(command, check=True, cwd=finished.folder, env=finished.environment())
    report = OpenedPage(browser, tmp_path / "page.html")
    report.page.wait_for_timeout(300)
    assert report.page.title() == "longhaul: tiny"
    assert attack in report.page.inner_text("#samples")
