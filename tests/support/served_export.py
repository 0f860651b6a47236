"""Exports with the reference values of their checkpoints, made without a training, for tests of servers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from longhaul.artifacts.artifact_schemas import Export, GeneratedSample
from longhaul.artifacts.atomic_files import file_blake3, file_sha256
from longhaul.train.checkpoint.checkpoint_folders import reference_folder
from tests.support.checkpoint_manifest import manifest_fields

PROMPTS = ("to be or", "not to be", "that is the")


def write_llama_export(root: Path) -> Path:
    """Write a Llama of two layers, and return the export's manifest. Its logits and completions are transformers' own."""
    import torch
    import transformers

    from tests.support.stage_folder import write_tokenizer

    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    folder = root / "model"
    write_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.LlamaForCausalLM(config).eval()
    # Each token is a byte. Only tokens of printable ASCII are likely, as other bytes make no text.
    others = [token for text, token in tokenizer.get_vocab().items() if len(text) > 1 or not "!" <= text <= "~"]
    model.lm_head.weight.data[others] = 0.0
    model.save_pretrained(folder)
    samples: list[GeneratedSample] = []
    for prompt in PROMPTS:
        ids_1T = tokenizer(prompt, return_tensors="pt").input_ids
        answer = model.generate(ids_1T, do_sample=False, max_new_tokens=24)[0, ids_1T.shape[1] :]
        completion = str(tokenizer.decode(answer, skip_special_tokens=True))
        samples.append({"split": "validation", "prompt": prompt, "completion": completion, "ended_with_eos": False})
    ids_PT = torch.randint(3, 259, (2, 32))
    with torch.no_grad():
        logits_PTV = model(ids_PT).logits.float()
    sample_ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    return write_manifest(root, folder, ids_PT.numpy(), logits_PTV.numpy(), samples, sample_ids)


def write_manifest(
    root: Path,
    folder: Path,
    ids_PT: np.ndarray,
    logits_PTV: np.ndarray,
    samples: list[GeneratedSample],
    sample_ids: list[list[int]],
) -> Path:
    """Write the manifest of an export in `folder`, and a checkpoint with the given reference values; return its path."""
    checkpoint, manifest = root / "checkpoint", root / "export.json"
    _write_checkpoint(checkpoint, ids_PT, logits_PTV, sample_ids)
    Export(
        stage="main",
        checkpoint=str(checkpoint),
        step=2,
        path=str(folder),
        dtype="fp32",
        parameters=1,
        bytes=1,
        files={path.name: file_sha256(path) for path in folder.iterdir()},
        verification={"logits": {"max_abs_difference": 0.0}},
        samples=samples,
        provenance={"checkpoint_sha256": file_sha256(checkpoint / "manifest.json")},
    ).write(manifest)
    return manifest


def _write_checkpoint(
    checkpoint: Path, ids_PT: np.ndarray, logits_PTV: np.ndarray, sample_ids: list[list[int]]
) -> None:
    reference = reference_folder(checkpoint)
    reference.mkdir(parents=True)
    tensors = {"input_ids": ids_PT.astype(np.int64), "logits": logits_PTV.astype(np.float32)}
    save_file(tensors, reference / "logits.safetensors")
    computed = {"device": "cpu", "threads": 1, "dtype": "fp32", "torch": "2.13.0"}
    (reference / "logits.json").write_text(json.dumps(computed))
    (reference / "prompts.json").write_text(json.dumps({"split": "validation", "input_ids": sample_ids}))
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "blake3": file_blake3(path)}
        for path in reference.iterdir()
    }
    manifest = manifest_fields(files, step=2, has_reference_values=True)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
