"""The gradient of a global batch is that of its mean token loss, for every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launch_ranks import run_worker

WORKER = Path(__file__).parents[2] / "support" / "gradient_worker.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Return layout -> name -> gradient."""
    folder = tmp_path_factory.mktemp("gradients")
    for ranks in (1, 2, 4):
        run_worker(WORKER, ranks, str(folder))
    return {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def test_a_masked_batch_gives_the_same_gradient_in_every_layout(results: dict[str, dict[str, torch.Tensor]]):
    """Micro batch 1, 2, 4 x data parallel 1, 2, 4, to 1e-6 of the largest gradient; ZeRO 0 and 1."""
    assert len(results) == 12
    reference = results["ranks1-micro4-zero0"]
    largest = max(gradient.abs().max().item() for gradient in reference.values())
    for layout, gradients in results.items():
        for name, gradient in gradients.items():
            difference = (gradient - reference[name]).abs().max().item()
            assert difference <= 1e-6 * largest, (
                f"{layout}: {name} differs by {difference} (largest gradient {largest})"
            )


def test_the_gradient_is_that_of_the_mean_token_loss(results: dict[str, dict[str, torch.Tensor]]):
    """Plain PyTorch gives the same gradient, without DeepSpeed and without micro batches."""
    import transformers

    from tests.support.gradient_worker import VOCABULARY, batch

    found = results["ranks1-micro1-zero0"]
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    whole = batch()
    logits = model(input_ids=whole.input_ids, position_ids=whole.position_ids).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole.labels.flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-7, rtol=1e-4)
