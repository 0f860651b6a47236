"""What a conversion is measured against later: hashes of the live master weights, and logits of fixed prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from longhaul.artifacts import write_json
from longhaul.jobs import StageJob
from longhaul.train.processes import Processes

PROMPTS, PROMPT_TOKENS = 2, 32
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_proof(engine: Any, job: StageJob, folder: Path, processes: Processes) -> None:
    """Writes tensors.json, logits.safetensors and logits.json; every rank takes part, rank 0 writes."""
    tensors = _tensor_hashes(engine, _DTYPES[job.stage.export_dtype], processes)
    input_ids_PT = _prompts(job)
    logits_PTV = _logits(engine, input_ids_PT, processes)
    if not processes.is_main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tensors.json", tensors)
    save_file({"input_ids": input_ids_PT, "logits": logits_PTV}, folder / "logits.safetensors")
    made = {
        "device": processes.device.type,
        "threads": torch.get_num_threads(),
        "dtype": job.stage.precision,
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    write_json(folder / "logits.json", made)


def _tensor_hashes(engine: Any, dtype: torch.dtype, processes: Processes) -> dict[str, dict[str, Any]]:
    """Name -> shape and hashes, gathered one tensor at a time, by DeepSpeed's own route and not from its files."""
    aliases = _aliases(engine.module)
    hashes = {}
    for name, value, is_buffer in _tensors(engine):
        if processes.is_main:
            entry = {
                "shape": list(value.shape),
                "sha256_fp32": _sha256(value.float()),
                "sha256_export": _sha256(value if is_buffer else value.to(dtype)),
            }
            hashes[name] = entry | ({"aliases": aliases[name]} if name in aliases else {})
    return hashes


def _tensors(engine: Any) -> Iterator[tuple[str, torch.Tensor, bool]]:
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        master = parameter.detach() if engine.zero_optimization_stage() == 0 else safe_get_full_fp32_param(parameter)
        if master is None:
            raise RuntimeError(f"DeepSpeed holds no master weights of {name}")
        yield name, master.cpu(), False
    saved = engine.module.state_dict().keys()
    for name, buffer in engine.module.named_buffers():
        if name in saved:
            yield name, buffer.detach().cpu(), True


def _aliases(module: torch.nn.Module) -> dict[str, list[str]]:
    """First name of a shared parameter -> its other names."""
    first: dict[int, str] = {}
    shared: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            shared.setdefault(first[id(parameter)], []).append(name)
        first.setdefault(id(parameter), name)
    return shared


def _sha256(value: torch.Tensor) -> str:
    return hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _prompts(job: StageJob) -> torch.Tensor:
    """input_ids [P, T] int64, the same for the same seed and vocabulary."""
    generator = torch.Generator().manual_seed(job.seed)
    return torch.randint(job.model["vocab_size"], (PROMPTS, PROMPT_TOKENS), generator=generator)


def _logits(engine: Any, input_ids_PT: torch.Tensor, processes: Processes) -> torch.Tensor:
    """logits [P, T, V] fp32, one prompt at a time, as the proof will compute them again."""
    engine.eval()
    with torch.no_grad():
        rows = [engine(input_ids=row[None].to(processes.device), use_cache=False).logits for row in input_ids_PT]
    engine.train()
    return torch.cat(rows).float().cpu()
