"""The report in a real browser: whole, drawn, silent, and nothing in it that a run's text could start."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from transformers import AutoTokenizer

from longhaul.artifacts.schemas import DataManifest
from longhaul.data.shards.indexed_dataset import SplitReader
from longhaul.report.number_format import size
from tests.support.chain import Chain

SECTIONS = ["plan", "environment", "fabric", "data", "timeline", "samples", "proof", "provenance"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium of the system."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("not installed: chromium (make test-packages)")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=quiet)
        yield browser
        browser.close()


class Shown:
    """A page that was opened, and what it complained of or asked for."""

    def __init__(self, browser: Browser, path: Path) -> None:
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(".main-svg")


@pytest.fixture(scope="module")
def shown(browser: Browser, finished: Chain) -> Shown:
    return Shown(browser, finished.results / "report.html")


def test_it_is_one_page_that_asks_for_nothing(shown: Shown, finished: Chain):
    assert shown.complaints == []
    assert [url for url in shown.requests if not url.startswith(("data:", "blob:"))] == [
        (finished.results / "report.html").as_uri()
    ]


def test_every_section_is_there_and_says_something(shown: Shown):
    for section in [*SECTIONS, "stage-base", "stage-chat"]:
        text = shown.page.inner_text(f"#{section}")
        assert len(text.splitlines()) > 2, section
        assert "None" not in text and "nan" not in text.lower().split(), (section, text)


def test_curves_are_drawn_and_each_has_its_level(shown: Shown):
    for stage, level in (("base", "unigram entropy of the data"), ("chat", "validation before this stage")):
        figures = shown.page.query_selector_all(f"#stage-{stage} .js-plotly-plot")
        assert len(figures) == 4
        assert "training that counts" in (figures[3].text_content() or "")
        legend = figures[0].query_selector_all(".legendtext")
        assert [entry.text_content() for entry in legend] == ["training", "validation", level]
        assert len(figures[0].query_selector_all(".scatterlayer .js-line")) == 3
    bars = shown.page.query_selector_all("#timeline .bars .point")
    assert len(bars) >= 8


def test_numbers_are_those_of_the_run(shown: Shown, finished: Chain):
    rows = [json.loads(line) for line in (finished.weights("base") / "metrics.jsonl").open()]
    last = [row["validation_loss"] for row in rows if "validation_loss" in row][-1]
    assert f"{last:.3f}" in shown.page.inner_text("#stage-base")
    planned = json.loads((finished.results / "plan.json").read_text())["stages"][0]["memory_per_gpu_gib"]["total"]
    assert f"memory planned for a GPU\n{size(planned * 2**30)}" in shown.page.inner_text("#stage-base")
    proof = finished.read("export/base.json")["proof"]
    assert str(proof["tensors"]["count"]) in shown.page.inner_text("#proof")


def test_samples_begin_as_held_out_documents(finished: Chain):
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


def test_text_of_a_run_stays_text(browser: Browser, finished: Chain, tmp_path: Path):
    """A model may well write <script>; so may a tokenizer's template or a host name."""
    results = tmp_path / "tiny"
    shutil.copytree(finished.results, results, ignore=shutil.ignore_patterns("checkpoints", "*.safetensors"))
    attack = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    export = json.loads((results / "export" / "base.json").read_text())
    export["samples"] = [{"prompt": attack, "split": "validation", "completion": attack, "ended_with_eos": True}]
    (results / "export" / "base.json").write_text(json.dumps(export))
    (results / "config.yaml").write_text(attack)
    command = [sys.executable, "-m", "longhaul", "report", str(results), str(tmp_path / "page.html")]
    subprocess.run(command, check=True, cwd=finished.folder, env=finished.environment())
    shown = Shown(browser, tmp_path / "page.html")
    shown.page.wait_for_timeout(300)
    assert shown.page.title() == "longhaul: tiny"
    assert attack in shown.page.inner_text("#samples")
