"""The whole check, with a stand-in for vLLM that is wrong in one way at a time."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from longhaul.artifacts.artifact_schemas import Export
from longhaul.artifacts.serve_check_result import ServeCheckResult
from longhaul.config.serve_check_config import ServeCheck
from longhaul.config.serve_config import Serve
from longhaul.config.site_serving_config import Serving
from longhaul.errors import UserError
from longhaul.jobs.kinds.serve_check_job import ServeCheckSpec
from longhaul.serving.check_server import run
from tests.support import bigram_vllm
from tests.support.served_export import write_manifest


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """The manifest of an export whose model is the table of bigrams."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    # Every token ends one of the prompts that are made of these two, so that all their answers are different.
    ids_PT = np.random.default_rng(3).permutation(bigram_vllm.VOCABULARY).reshape(2, -1)
    return write_manifest(tmp_path, folder, ids_PT, bigram_vllm.logits()[ids_PT], [], [])


def job_of(manifest: Path, fault: str = "", **serving: object) -> ServeCheckSpec:
    python = (sys.executable, bigram_vllm.__file__)
    own = Serving.model_validate({"engine": "vllm", "python": python, "environment": {"FAULT": fault}, **serving})
    return ServeCheckSpec(
        run="unit",
        stage="main",
        export=str(manifest),
        dtype="fp32",
        serving=own,
        serve=Serve(),
        check=ServeCheck(streams=(1, 32), answer_tokens=4, start_timeout_s=60.0),
        nodes=1,
        tensor=1,
        pipeline=1,
        context_tokens=64,
        out=str(manifest.with_name("result.json")),
    )


@pytest.mark.usefixtures("no_new_process")
def test_the_check_compares_measures_and_leaves_no_process(manifest: Path, capfd: pytest.CaptureFixture[str]):
    job = job_of(manifest)
    run(job)
    result = ServeCheckResult.read(Path(job.out))
    assert (result.engine, result.engine_version, result.path) == ("vllm", "0.0", str(manifest.with_name("model")))
    assert result.agreement["compared"] == 2 * 24
    assert (result.agreement["largest_difference"] or 1) < 1e-5
    assert [(step["streams"], step["tokens"]) for step in result.load] == [(1, 4), (32, 128)]
    assert all(step["tokens_per_s"] > 0 for step in result.load)
    assert [step.get("largest_difference") for step in result.load] == [0.0, 0.0]
    assert all((step["first_token_median_s"] or 0) > 0 for step in result.load)
    assert result.distinct_answers > 16
    assert result.refuses_other_keys
    assert len(result.listens_at) == 1
    assert result.listens_at[0].startswith("127.0.0.1:")
    assert result.host_memory_bytes > 10**7
    assert "Bearer" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("no_new_process")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("another_model", "log probabilities of the server differ from the trainer's by"),
        ("open", "answers a request to /v1/models without an API key with HTTP status 200 instead of 401"),
        ("exposed", r"listens at 0\.0\.0\.0:\d+ instead of 127\.0\.0\.1:\d+ alone"),
        ("exchange", "with 32 requests at the same time, answer .* is not the answer to its prompt: token 1 is"),
        ("loss", "the server lost an answer: it ended without a finish reason"),
    ],
)
def test_a_fault_of_a_server_is_noticed(manifest: Path, fault: str, message: str):
    job = job_of(manifest, fault)
    with pytest.raises(UserError, match=message):
        run(job)
    assert not Path(job.out).exists()


def test_a_missing_engine_is_named(manifest: Path):
    with pytest.raises(UserError, match=r"serving\.python: /none/python does not start: No such file"):
        run(job_of(manifest, python=("/none/python",)))
    with pytest.raises(UserError, match=r"serving\.engine sglang needs the package sglang"):
        run(job_of(manifest, engine="sglang", python=(sys.executable,)))
    with pytest.raises(UserError, match=r"`false` does not start a Python"):
        run(job_of(manifest, python=("false",)))


def test_altered_reference_values_are_refused_until_they_are_restored(manifest: Path):
    logits = Path(Export.read(manifest).checkpoint) / "reference" / "logits.json"
    written = logits.read_text()
    logits.write_text(written.replace("fp32", "bf16"))
    with pytest.raises(UserError, match="does not have the hash that was recorded") as refused:
        run(job_of(manifest))
    assert refused.value.hint == "restore the checkpoint's files, or train and export the stage again"
    logits.write_text(written)
    run(job_of(manifest))


def test_an_altered_export_is_refused(manifest: Path):
    (manifest.with_name("model") / "config.json").write_text('{"rope_theta": 1}')
    with pytest.raises(UserError, match="the export is damaged"):
        run(job_of(manifest))
