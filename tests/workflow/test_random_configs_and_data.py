"""Any config, site file, data or model folder is planned and rendered, or refused with a message. Nothing hangs or crashes."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from longhaul.artifacts.artifact_schemas import Checkpoint, DataManifest
from longhaul.artifacts.paths import WeightsFolder
from longhaul.config.load_config import load_config
from longhaul.data.check_first_rows import check_inputs
from longhaul.data.readers.read_documents import read_documents
from longhaul.data.sampling.samples import Samples
from longhaul.data.tokenizers.build_tokenizer import DEFAULT_CHAT_TEMPLATE
from longhaul.data.tokenizers.document_encoder import DocumentEncoder
from longhaul.errors import UserError
from longhaul.jobs.job_kind import job_kinds, job_spec, jobs_of
from longhaul.jobs.launch_files import render_run, write_launch_files
from longhaul.planning import Plan, build_plan
from longhaul.report.metric_series import read_metrics
from longhaul.report.plan_table import print_plan
from longhaul.report.run_results import read_run
from tests.support import train_planned_run
from tests.support.chat_families import FAMILIES, make_family_tokenizer
from tests.support.corpora import dataset, make_tokenizer
from tests.support.finished_run_files import write_finished_run
from tests.support.hypothesis_strategies import CHAT_ROWS, TOKENIZER_SETTINGS, Inputs, inputs, tampered
from tests.support.launch_ranks import run_worker
from tests.support.pipeline_run import local_site, write_data, write_site
from tests.support.short_training_configs import trainings

ACCEPTED = 50
"""Accepted configs that are trained."""
_CONTROL = {*map(chr, [*range(9), *range(11, 32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)])}
"""Characters that change what a terminal shows, apart from tabs and line breaks."""


@contextlib.contextmanager
def ends_in_time(seconds: float = 20) -> Iterator[None]:
    """Fail a step that hangs. hypothesis compares an example with its deadline only after the example has ended.

    The timer and the handler of pytest-timeout, which bounds the whole test, are put back.
    """

    def fail(*_signal: object) -> None:
        pytest.fail(f"not ended after {seconds} s")

    began_s = time.monotonic()
    handler = signal.signal(signal.SIGALRM, fail)
    test_ends_in_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        left_s = max(0.001, test_ends_in_s - (time.monotonic() - began_s)) if test_ends_in_s else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, left_s)


def test_a_step_that_hangs_is_ended():
    began_s, test_ends_in_s = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)[0]
    with pytest.raises(pytest.fail.Exception, match="not ended after 1 s"), ends_in_time(1):
        time.sleep(60)
    assert time.monotonic() - began_s < 30
    assert abs(signal.getitimer(signal.ITIMER_REAL)[0] - test_ends_in_s) < 30, "the timer of pytest-timeout is lost"


def planned(path: Path) -> tuple[Plan, list[str]] | UserError:
    """Plan, print and render a run; return the plan with each job's launch.json, or the refusal."""
    try:
        with ends_in_time():
            plan = build_plan(load_config(path))
            check_inputs(plan)
            with contextlib.redirect_stdout(io.StringIO()):
                print_plan(plan)
            rendered = render_run(plan, path.parent)
    except UserError as error:
        return error
    return plan, [found.files["launch.json"] for found in rendered.values() if "launch.json" in found.files]


def assert_is_message(error: UserError) -> None:
    """The text is one short message for a terminal, with a remedy."""
    text = str(error)
    assert error.hint and len(text) < 20_000, text[:4000]
    assert not _CONTROL & set(text), f"control characters in {text!r}"


@given(drawn=inputs())
def test_any_run_is_planned_and_rendered_or_refused(drawn: Inputs):
    """Each job of an accepted run has steps. A refusal is a short message with a remedy."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = planned(drawn.write(Path(folder) / "run"))
    if isinstance(outcome, UserError):
        assert_is_message(outcome)
    else:
        _, launched = outcome
        assert launched and all(json.loads(text)["steps"] for text in launched), "a job that runs nothing"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DocumentEncoder]:
    folder = tmp_path_factory.mktemp("families")
    tokenizers = {name: make_family_tokenizer(name, folder / name) for name in FAMILIES}
    return {name: DocumentEncoder(found, dataset("chat"), "tokenizers") for name, found in tokenizers.items()}


@given(row=CHAT_ROWS)
def test_any_chat_row_is_encoded_or_refused(encoders: dict[str, DocumentEncoder], row: dict[str, Any]):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.jsonl"
        file.write_text(json.dumps(row))
        try:
            with ends_in_time():
                documents = list(read_documents([str(file)], dataset("chat")))
        except UserError as error:
            assert_is_message(error)
            return
        for encoder in encoders.values():
            with ends_in_time():
                encoded = encoder.encode(documents)
            assert len(encoded.lengths) + len(encoded.left_out) == 1
            for error in encoded.left_out:
                assert_is_message(error)
            if len(encoded.lengths):
                assert encoded.mask is not None and np.any(encoded.mask[1:])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("one ship sails, two ships sail\n" * 50)
    return Path(make_tokenizer(folder, [folder / "a.txt"]).path)


@given(changes=TOKENIZER_SETTINGS, special=st.none() | TOKENIZER_SETTINGS, data=st.data())
def test_any_tokenizer_folder_is_built_or_refused(
    tokenizer: Path, changes: dict[str, Any], special: dict[str, Any] | None, data: st.DataObject
):
    content = (tokenizer / "tokenizer.json").read_bytes()
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tokenizer"
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes(data.draw(st.just(content) | tampered(content)))
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
        if special is not None:
            (folder / "special_tokens_map.json").write_text(json.dumps(special))
        try:
            with ends_in_time(), contextlib.redirect_stdout(io.StringIO()):
                make_tokenizer(Path(name), path=str(folder), chat_template=str(DEFAULT_CHAT_TEMPLATE))
        except UserError as error:
            assert_is_message(error)


def prepare_data(plan: Plan) -> None:
    """Write the launch files, train the tokenizer and tokenize, in the working folder."""
    write_launch_files(plan, Path.cwd())
    for job in jobs_of(plan):
        if job.kind in ("tokenizer", "index_sources", "encode", "tokenize"):
            job_kinds()[job.kind].load_entry_point()(job_spec(plan, job))


def in_epochs(config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the config with two steps as epochs: somewhat less, because steps are rounded up. The data exist already."""
    stage = plan.stages[0].stage
    manifest = DataManifest.read(plan.paths.manifest(stage.dataset))
    opened = (stage.kind, stage.sequence_length, plan.config.seed, Path("counted"))
    samples = Samples.open(manifest, "train", *opened, truncate=stage.truncate).distinct_count
    keys = {key: value for key, value in config["stages"][0].items() if key != "steps"}
    return {**config, "stages": [{**keys, "epochs": 1.5 * stage.global_batch_size / samples}]}


def plan_or_reject(config: dict[str, Any], folder: Path) -> Plan:
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    outcome = planned(folder / "run.yaml")
    if isinstance(outcome, UserError):
        assert_is_message(outcome)
        reject()
    return outcome[0]


def train_two_steps(config: dict[str, Any], as_epochs: bool) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        write_data(folder)
        write_site(folder, local_site())
        plan = plan_or_reject(config, folder)
        prepare_data(plan)
        if as_epochs:
            plan = plan_or_reject(in_epochs(config, plan), folder)
            write_launch_files(plan, folder)
        run_worker(Path(train_planned_run.__file__), plan.stages[0].world_size, name)
        checkpoint = Checkpoint.read(plan.paths.stage("main").checkpoint)
        assert checkpoint.steps == 2
        curves = read_metrics(WeightsFolder(Path(checkpoint.weights)).metrics).curves
        assert curves["loss"].x == [1, 2] and len(curves["loss"].values) == 2


@pytest.mark.slow
def test_accepted_runs_train_their_steps():
    """Refused examples do not count: without enough accepted ones, the test would pass without training."""
    accepted = 0

    @settings(max_examples=ACCEPTED, deadline=None)
    @given(config=trainings(), as_epochs=st.booleans())
    def train(config: dict[str, Any], as_epochs: bool) -> None:
        nonlocal accepted
        train_two_steps(config, as_epochs)
        accepted += 1

    train()
    assert accepted >= ACCEPTED


@pytest.fixture(scope="module")
def finished_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A finished run of fake files: its results folder, and its JSON files below."""
    results = tmp_path_factory.mktemp("finished") / "results"
    folder = write_finished_run(results).folder
    return folder, sorted(path for path in folder.rglob("*.json*") if path.stat().st_size > len("{}\n"))


@given(data=st.data())
def test_any_tampered_file_of_a_run_is_read_or_refused(finished_files: tuple[Path, list[Path]], data: st.DataObject):
    folder, files = finished_files
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    try:
        path.write_bytes(data.draw(tampered(content)))
        with ends_in_time():
            read_run(folder)
    except UserError as error:
        assert_is_message(error)
    finally:
        path.write_bytes(content)
