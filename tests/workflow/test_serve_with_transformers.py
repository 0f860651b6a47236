"""`longhaul serve` with the default engine, asked with OpenAI's client."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support.run_with_fake_engine import LOCAL_SITE, ServedRun, listening_addresses
from tests.support.small_configs import LLAMA
from tests.support.stage_folder import write_tokenizer
from tests.support.wait import wait_for


@pytest.mark.slow
def test_transformers_serve_answers_on_this_machine_alone(tmp_path: Path):
    """It knows no key, the name of the model is its folder, and no file has the prompt."""
    run = ServedRun(tmp_path.resolve(), {}, {**LOCAL_SITE, "serving": {}}, key=None)
    write_tokenizer(run.folder / "model")
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA)).save_pretrained(run.folder / "model")
    run.write_export(run.folder / "model")
    endpoint = run.start()
    assert endpoint.key_file is None and not run.job.api_key.exists()
    assert listening_addresses(run.processes()) == {"127.0.0.1"}
    client = OpenAI(base_url=endpoint.url, api_key="none")
    answered = client.completions.create(model=endpoint.model, prompt="one two", max_tokens=5, temperature=0)
    assert answered.usage and answered.usage.completion_tokens == 5
    assert run.call("--stop").returncode == 0
    wait_for(lambda: not run.processes())
    texts = [path.read_text(errors="replace") for path in (run.folder / "results").rglob("*") if path.is_file()]
    assert any("/v1/completions" in text for text in texts), "the server's log is among the files"
    assert not any("one two" in text for text in texts)
