"""What an export needs of the trainer: hashes of the live master weights and logits of fixed prompts, against which it is
measured, and the beginnings of held-out documents, which it completes for the report."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from longhaul.artifacts.files import write_json
from longhaul.data.sampling.samples import Samples
from longhaul.jobs.specs import TrainSpec
from longhaul.train.backend import Backend
from longhaul.train.distributed_context import DistributedContext
from longhaul.train.parallel.checkpoint_layout import TIED, is_tied
from longhaul.train.parallel.gather_weights import sha256, whole_tensors

PROMPTS, PROMPT_TOKENS = 2, 32
SAMPLE_PROMPTS = 6
_MOST_DOCUMENTS_READ = 1000
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_proof(
    backend: Backend, job: TrainSpec, folder: Path, processes: DistributedContext, prompts: dict[str, Any]
) -> None:
    """Writes tensors.json, logits.safetensors, logits.json and prompts.json; every rank takes part, rank 0 writes."""
    tensors = _tensor_hashes(backend.engine, job, processes)
    input_ids_PT = _prompts(job)
    logits_PTV = torch.cat([backend.logits(row_T) for row_T in input_ids_PT]).float().cpu()
    if not processes.is_main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tensors.json", tensors)
    write_json(folder / "prompts.json", prompts)
    save_file({"input_ids": input_ids_PT, "logits": logits_PTV}, folder / "logits.safetensors")
    made = {
        "device": processes.device.type,
        "threads": torch.get_num_threads(),
        "dtype": job.stage.precision,
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        # These sum in another order than the exported model does on one device.
        "splits_sums": max(job.stage.parallel.tensor, job.stage.parallel.expert, job.stage.parallel.sequence) > 1,
    }
    write_json(folder / "logits.json", made)


def _tensor_hashes(engine: Any, job: TrainSpec, processes: DistributedContext) -> dict[str, dict[str, Any]]:
    """Name -> shape and hashes, gathered one tensor at a time, by DeepSpeed's own route and not from its files."""
    dtype = _DTYPES[job.stage.export_dtype]
    aliases = _aliases(engine.module, is_tied(job))
    hashes = {}
    for name, value, is_buffer in whole_tensors(engine, processes):
        entry = {
            "shape": list(value.shape),
            "sha256_fp32": sha256(value.float()),
            "sha256_export": sha256(value if is_buffer else value.to(dtype)),
        }
        hashes[name] = entry | ({"aliases": aliases[name]} if name in aliases else {})
    return hashes


def _aliases(module: torch.nn.Module, is_tied: bool) -> dict[str, list[str]]:
    """First name of a shared parameter -> its other names."""
    if is_tied:
        return {name: [alias] for alias, name in TIED.items()}
    first: dict[int, str] = {}
    shared: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            shared.setdefault(first[id(parameter)], []).append(name)
        first.setdefault(id(parameter), name)
    return shared


def sample_prompts(**splits: Samples | None) -> dict[str, Any]:
    """{"split", "input_ids": [[int]]}: how the first few documents begin, no two alike, of the first split that has any."""
    split, samples = next((name, samples) for name, samples in splits.items() if samples)
    distinct = dict.fromkeys(islice(samples.openings(), _MOST_DOCUMENTS_READ))
    return {"split": split, "input_ids": [list(ids) for ids in islice(distinct, SAMPLE_PROMPTS)]}


def _prompts(job: TrainSpec) -> torch.Tensor:
    """input_ids [P, T] int64, the same for the same seed and vocabulary."""
    generator = torch.Generator().manual_seed(job.seed)
    return torch.randint(job.model["vocab_size"], (PROMPTS, PROMPT_TOKENS), generator=generator)
