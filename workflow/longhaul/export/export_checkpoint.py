"""Exports one checkpoint as a Hugging Face folder, and keeps it only when it is proved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from longhaul.artifacts.files import file_sha256, read_json, write_text
from longhaul.artifacts.schemas import Export
from longhaul.checkpoint_io import open_master_weights
from longhaul.errors import UserError
from longhaul.export.check_loading import prove_loading
from longhaul.export.check_logits import Exported, compute_dtype, prove_logits
from longhaul.export.check_tensors import DTYPES, HASHING_THREADS, prove_tensors
from longhaul.export.model_card import card, provenance
from longhaul.export.safetensors_writer import write_shards
from longhaul.export.sample_text import samples
from longhaul.export.source_checkpoint import Source, open_source
from longhaul.export.tensor_layout import ExportedTensor, export_layout, hugging_face_config, meta_model
from longhaul.jobs.specs import ExportSpec
from longhaul.train.checkpoint.folders import fsync

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def run(job: ExportSpec) -> None:
    """Verifies the checkpoint, writes the folder, proves it, samples from it; job.out is written last.

    Raises:
        UserError: the checkpoint is not whole, or a proof failed; then neither folder nor job.out is left as new.
    """
    Path(job.out).unlink(missing_ok=True)
    source = open_source(job)
    masters = open_master_weights(source.folder)
    dtype = DTYPES[job.dtype]
    model = meta_model(source.model_config)
    architecture, tensors = type(model).__name__, list(export_layout(model, masters, dtype))
    parameters = sum(tensor.numel for tensor in tensors)
    facts = provenance(job, source)
    with _staged(Path(job.folder)) as folder:
        write_shards(folder, tensors)
        _write_config(folder, source, architecture, dtype)
        _copy_tokenizer(Path(source.tokenizer.path), folder)
        proof, sampled = _prove(job, source, folder, tensors)
        write_text(folder / "README.md", card(facts, architecture, parameters, job.folder, proof))
    paths = sorted(Path(job.folder).iterdir())
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        files = dict(zip((path.name for path in paths), pool.map(file_sha256, paths), strict=True))
    Export(
        stage=job.stage,
        checkpoint=str(source.folder),
        step=source.step,
        path=job.folder,
        dtype=job.dtype,
        parameters=parameters,
        bytes=sum(tensor.size_bytes for tensor in tensors),
        files=files,
        proof=proof,
        samples=sampled,
        provenance=facts,
    ).write(Path(job.out))


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which replaces it when the block ends well and is removed when it does not."""
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        fsync(folder.parent)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_config(folder: Path, source: Source, architecture: str, dtype: torch.dtype) -> None:
    """config.json and generation_config.json; the special ids are the tokenizer's."""
    config = hugging_face_config(source.model_config)
    ids = {
        "bos_token_id": source.tokenizer.bos_id,
        "eos_token_id": source.tokenizer.eos_id,
        "pad_token_id": source.tokenizer.pad_id,
    }
    for key, value in ids.items():
        setattr(config, key, value)
    config.architectures, config.dtype, config.use_cache = [architecture], dtype, True
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)


def _prove(
    job: ExportSpec, source: Source, folder: Path, tensors: list[ExportedTensor]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The proofs and the samples, neither of which ever has more than one decoder layer in memory."""
    recorded, dtype = source.folder / "proof", DTYPES[job.dtype]
    exported = Exported(folder, read_json(folder / "config.json"), tensors)
    proof = {
        "tensors": prove_tensors(folder, tensors, recorded, dtype),
        "from_pretrained": prove_loading(folder, tensors, dtype),
        "logits": prove_logits(exported, recorded, dtype),
    }
    return proof, _samples(job, source, exported)


def _samples(job: ExportSpec, source: Source, exported: Exported) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(exported.folder, local_files_only=True)
    if job.chat and not tokenizer.chat_template:
        raise UserError(f"{source.tokenizer.path} has no chat template", "set tokenizer.chat_template in the config")
    recorded = source.folder / "proof"
    weights_bytes = sum(tensor.size_bytes for tensor in exported.tensors)
    model = exported.model(compute_dtype(recorded))
    return samples(model, weights_bytes, tokenizer, read_json(recorded / "prompts.json"))
