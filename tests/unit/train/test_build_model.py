"""The network that is built computes what its config asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.errors import UserError
from longhaul.train.build_model import (
    build_model_config,
    check_rotary_embedding,
    place_of_fp32_weights,
    train_every_embedding,
)
from tests.support.small_configs import DEEPSEEK, LLAMA

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA},
    "qwen3 with its default width": {"model_type": "qwen3", **LLAMA},
    "llama with yarn": {"model_type": "llama", **LLAMA, "rope_scaling": YARN},
    "deepseek_v2": {"model_type": "deepseek_v2", **DEEPSEEK},
    "deepseek_v3 with yarn": {
        "model_type": "deepseek_v3",
        **DEEPSEEK,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
}


def network(keys: dict[str, Any]) -> Any:
    """Return the model on the meta device, with its rotary embedding on the CPU as the trainer builds it."""
    config = AutoConfig.for_model(**{key: dict(v) if isinstance(v, dict) else v for key, v in keys.items()})
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)
def test_rotary_embedding_follows_the_config(keys: dict[str, Any]):
    check_rotary_embedding(network(keys), keys)


def test_network_without_the_asked_scaling_is_refused_until_the_keys_are_those_of_the_network():
    """Simulate the fault of releases before 0.2.0: `rope_type: default` replaced the given `type`."""
    unscaled = network({**MODELS["llama"], "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}})
    with pytest.raises(UserError, match="frequencies"):
        check_rotary_embedding(unscaled, {**MODELS["llama"], "rope_theta": 5e5})
    for scaling, problem in (
        (YARN, "attention scale is 1; .* asks for 1.13863"),
        ({"type": "linear", "factor": 2.0}, "frequencies"),
    ):
        with pytest.raises(UserError, match=problem):
            check_rotary_embedding(unscaled, {**MODELS["llama"], "rope_scaling": scaling})
    check_rotary_embedding(unscaled, MODELS["llama"])


def test_vocabulary_smaller_than_the_tokenizer_is_refused_until_it_is_larger():
    tokenizer = TokenizerManifest("t", "t0", 401, None, 1, 2, True, {}, [])
    job: Any = SimpleNamespace(model=MODELS["llama"], pretrained=None)
    with pytest.raises(UserError, match=r"401 tokens; .* vocab_size is 400\s+remedy: set vocab_size to at least 401"):
        build_model_config(job, tokenizer)
    job.model = {**MODELS["llama"], "vocab_size": 401}
    assert build_model_config(job, tokenizer).vocab_size == 401


def test_the_embedding_of_eos_learns_where_eos_is_also_the_padding_token():
    """GPT-2, Llama and Mistral have no padding token of their own. torch gives no gradient to the row of its padding_idx."""
    eos = 3
    ids = torch.tensor([[5, 6, eos, 7, 8, eos]])
    gradients = []
    for pad in (None, eos):
        torch.manual_seed(1)
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**MODELS["llama"], eos_token_id=eos, pad_token_id=pad)
        )
        embedding = model.model.embed_tokens
        with torch.no_grad():
            embedding.weight.copy_(torch.randn(embedding.weight.shape))
        assert embedding.padding_idx == pad
        train_every_embedding(model)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(embedding.weight.grad)
    assert gradients[0][eos].abs().sum() > 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("device", "zero_stage", "offload", "gpu_bytes", "is_on_gpu"),
    [
        ("cuda", 1, "none", 10**9, True),
        ("cuda", 1, "none", 10**5, False),  # the fp32 weights would fill more than half of it
        ("cuda", 3, "none", 10**9, False),
        ("cuda", 2, "cpu", 10**9, False),
        ("cpu", 1, "none", 10**9, False),
    ],
)
def test_a_gpu_builds_the_model_where_it_fits(
    device: str, zero_stage: int, offload: str, gpu_bytes: int, is_on_gpu: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=gpu_bytes), raising=True
    )
    zero = SimpleNamespace(stage=zero_stage, offload_optimizer=offload)
    job = SimpleNamespace(stage=SimpleNamespace(zero=zero), model=MODELS["llama"])
    assert isinstance(place_of_fp32_weights(cast(Any, job), torch.device(device)), torch.device) == is_on_gpu
