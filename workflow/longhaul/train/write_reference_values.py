"""Writes reference/ of a checkpoint for the export's verification: tensor hashes, logits of the prompts
that it draws, sample prompts.

| file               | content                                                                                  |
| tensors.json       | name -> shape and SHA-256 of every tensor, in fp32 and in the export's dtype              |
| logits.safetensors | input_ids [P, T] int64 of fixed prompts, and the live engine's logits [P, T, V] in fp32   |
| logits.json        | with what the logits were computed: device, threads, dtype, versions                     |
| prompts.json       | how held-out documents begin; the export completes them for the report                   |
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from longhaul.artifacts.atomic_files import write_json
from longhaul.artifacts.reference_files import COMPUTED_WITH, LOGITS, PROMPTS, TENSORS
from longhaul.compat.deepspeed import Engine
from longhaul.jobs.kinds.train_job import TrainSpec
from longhaul.planning.constants_shared_with_trainer import LOGITS_PROMPT_TOKENS
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.parallel.gather_to_rank0 import gather_whole_tensors, tensor_sha256
from longhaul.train.parallel.slice_index import TIED_WEIGHTS, has_tied_embeddings
from longhaul.train.step_backends import Backend

LOGITS_PROMPTS = 2
# The exporter rounds to FP8 itself, from master weights with the recorded hash.
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def write_reference_values(
    backend: Backend, job: TrainSpec, folder: Path, context: DistributedContext, prompts: dict[str, object]
) -> None:
    """Write the reference values of the current weights; every rank takes part, rank 0 writes."""
    tensors = _tensor_hashes(backend.engine, job, context)
    input_ids_PT = _logits_prompts(job)
    logits_PTV = torch.cat([backend.logits(row_T) for row_T in input_ids_PT]).float().cpu()
    if not context.is_main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TENSORS, tensors)
    write_json(folder / PROMPTS, prompts)
    save_file({"input_ids": input_ids_PT, "logits": logits_PTV}, folder / LOGITS)
    parallel = job.stage.parallel
    computed_with = {
        "device": context.device.type,
        "threads": torch.get_num_threads(),
        "dtype": "bf16" if job.stage.precision == "fp8" else job.stage.precision,  # evaluation mode uses no FP8
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        # These axes sum in another order than the exported model does on one device.
        "splits_sums": max(parallel.tensor, parallel.expert, parallel.sequence) > 1,
    }
    write_json(folder / COMPUTED_WITH, computed_with)


def _tensor_hashes(engine: Engine, job: TrainSpec, context: DistributedContext) -> dict[str, dict[str, object]]:
    """Return name -> shape and hashes, of one gathered tensor at a time.

    The tensors come from the live engine and not from the checkpoint's files, so the export is compared with an independent
    source.
    """
    dtype = _DTYPES[job.stage.export_dtype]
    aliases = _aliases(engine.module, has_tied_embeddings(job))
    hashes = {}
    for name, value, is_buffer in gather_whole_tensors(engine, context):
        entry = {
            "shape": list(value.shape),
            "sha256_fp32": tensor_sha256(value.float()),
            "sha256_export": tensor_sha256(value if is_buffer else value.to(dtype)),
        }
        hashes[name] = entry | ({"aliases": aliases[name]} if name in aliases else {})
    return hashes


def _aliases(module: torch.nn.Module, is_tied: bool) -> dict[str, list[str]]:
    """Return the first name of each shared parameter -> its other names."""
    if is_tied:
        return {name: [alias] for alias, name in TIED_WEIGHTS.items()}
    first: dict[int, str] = {}
    shared: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            shared.setdefault(first[id(parameter)], []).append(name)
        first.setdefault(id(parameter), name)
    return shared


def _logits_prompts(job: TrainSpec) -> torch.Tensor:
    """Return random input_ids [P, T] int64, the same for the same seed and vocabulary."""
    generator = torch.Generator().manual_seed(job.seed)
    return torch.randint(job.model["vocab_size"], (LOGITS_PROMPTS, LOGITS_PROMPT_TOKENS), generator=generator)
