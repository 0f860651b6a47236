"""Runs the export job in order (open, write, verify, sample), and replaces the old folder only when every verification passes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from longhaul.artifacts.artifact_schemas import Export, GeneratedSample
from longhaul.artifacts.atomic_files import (
    disk_full_as_user_error,
    file_sha256,
    read_json,
    replace_link,
    write_json,
    write_text,
)
from longhaul.artifacts.export_provenance import Provenance
from longhaul.artifacts.paths import latest_export
from longhaul.artifacts.reference_files import PROMPTS
from longhaul.artifacts.typed_json import read_typed_json
from longhaul.checkpoint_io import LazyTensor, open_master_weights
from longhaul.config.hub_tensors import untied_where_servers_do_not_tie
from longhaul.errors import InputError
from longhaul.export.exported_tensors import DTYPES, ExportedTensor, list_exported_tensors
from longhaul.export.fp8_tensors import DTYPE as FP8
from longhaul.export.fp8_tensors import with_fp8_matrices
from longhaul.export.generate_samples import SamplePrompts, generate_samples
from longhaul.export.hub_config import write_hub_config
from longhaul.export.model_card import model_card, provenance
from longhaul.export.model_without_memory import meta_model
from longhaul.export.open_verified_checkpoint import VerifiedCheckpoint, open_verified_checkpoint
from longhaul.export.pretrained_settings import end_token_ids, generation_settings
from longhaul.export.safetensors_writer import write_shards
from longhaul.export.tensor_blocks import HASHING_THREADS
from longhaul.export.tokenizer_files import write_tokenizer
from longhaul.export.verify_loading import verify_loading
from longhaul.export.verify_logits import WrittenExport, read_reference_logits, verify_logits
from longhaul.export.verify_tensors import verify_tensors
from longhaul.jobs.kinds.export_job import ExportSpec
from longhaul.train.checkpoint.checkpoint_folders import fsync


def run(job: ExportSpec) -> None:
    """Verify the checkpoint, write the folder, verify it and generate samples. job.out is written last.

    Raises:
        UserError: the checkpoint is damaged, or the export's verification fails. Then job.out does not exist, and the
            earlier exports in job.folder, and the link to the latest one, are unchanged.
    """
    Path(job.out).unlink(missing_ok=True)
    source = open_verified_checkpoint(job)
    masters = open_master_weights(source.folder)
    dtype = DTYPES[job.dtype]
    trained = meta_model(source.model_config)
    exported_model = meta_model(untied_where_servers_do_not_tie(source.model_config))
    tensors = _list_tensors(trained, exported_model, masters, dtype)
    architecture, parameters = type(trained).__name__, sum(math.prod(master.shape) for master in masters.values())
    facts = provenance(job, source)
    size_bytes = sum(tensor.size_bytes for tensor in tensors)
    export = Path(job.folder) / export_name(source, job.dtype)
    written = disk_full_as_user_error(
        "an export", Path(job.folder).parent, size_bytes, "remove exports that you do not need: longhaul prune"
    )
    with written, _replace_folder(export) as folder:
        write_shards(folder, tensors)
        _write_configs(folder, source, architecture, dtype)
        tokenizer = write_tokenizer(Path(source.tokenizer.path), folder)
        exported = WrittenExport(folder, read_json(folder / "config.json"), tensors)
        verification = _verify(exported, source, dtype) | {"tokenizer": tokenizer}
        samples = _samples(job, source, exported)
        write_text(folder / "README.md", model_card(facts, architecture, parameters, str(export), verification))
    replace_link(latest_export(Path(job.folder)), export.name)
    Export(
        stage=job.stage,
        checkpoint=str(source.folder),
        step=source.step,
        path=str(export),
        dtype=job.dtype,
        parameters=parameters,
        bytes=size_bytes,
        files=_file_hashes(export),
        verification=verification,
        samples=samples,
        provenance=Provenance(**facts),
    ).write(Path(job.out))


def export_name(source: VerifiedCheckpoint, dtype: str) -> str:
    """Return <hash of the weights>-<step>-<dtype>: exports of other weights, steps or precisions never replace each other."""
    return f"{Path(source.checkpoint.weights).name}-{source.step}-{dtype}"


def _list_tensors(
    trained: PreTrainedModel, exported: PreTrainedModel, masters: Mapping[str, LazyTensor], dtype: torch.dtype
) -> list[ExportedTensor]:
    if dtype != FP8:
        return list(list_exported_tensors(trained, exported, masters, dtype))
    return list(with_fp8_matrices(list_exported_tensors(trained, exported, masters, torch.bfloat16)))


@contextmanager
def _replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`. It replaces `folder` when the block succeeds, and is removed when it fails."""
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


def _write_configs(folder: Path, source: VerifiedCheckpoint, architecture: str, dtype: torch.dtype) -> None:
    """Write config.json and generation_config.json; what the pretrained model says in them stays."""
    tokenizer = {
        "bos_token_id": source.tokenizer.bos_id,
        "eos_token_id": source.tokenizer.eos_id,
        "pad_token_id": source.tokenizer.pad_id,
    }
    write_hub_config(folder / "config.json", source.model_config, tokenizer, architecture, dtype)
    generation = generation_settings(source.generation_config, source.model_config, tokenizer)
    write_json(folder / "generation_config.json", generation)


def _verify(exported: WrittenExport, source: VerifiedCheckpoint, dtype: torch.dtype) -> dict[str, dict[str, object]]:
    """Return the results of all verifications. None of them holds more than one decoder layer in memory."""
    tensors = list(exported.tensors)
    return {
        "tensors": verify_tensors(exported.folder, tensors, source.reference, dtype),
        "from_pretrained": verify_loading(exported.folder, tensors, dtype),
        "logits": verify_logits(exported, source.reference, dtype),
    }


def _samples(job: ExportSpec, source: VerifiedCheckpoint, exported: WrittenExport) -> list[GeneratedSample]:
    tokenizer = AutoTokenizer.from_pretrained(exported.folder, local_files_only=True)  # nosec B615  # the export
    if job.chat and not tokenizer.chat_template:
        raise InputError(f"{source.tokenizer.path} has no chat template", "set tokenizer.chat_template in the config")
    weights_bytes = sum(tensor.size_bytes for tensor in exported.tensors)
    model = exported.model(read_reference_logits(source.reference).compute)
    prompts = read_typed_json(source.reference / PROMPTS, SamplePrompts, "use another checkpoint")
    ends = end_token_ids(read_json(exported.folder / "generation_config.json"))
    return generate_samples(model, weights_bytes, tokenizer, ends, prompts)


def _file_hashes(folder: Path) -> dict[str, str]:
    """Return name -> SHA-256 of every file of the export."""
    paths = sorted(folder.iterdir())
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip((path.name for path in paths), pool.map(file_sha256, paths), strict=True))
