"""Trains cases of the parity table, compares them with the reference loop, and prints one line for each case.

python -m tests.parity.parity_table [parity | parity_relatives]
    both tables of parity_cases.py, or one; each is written to bench/results
python -m tests.parity.parity_table MODEL/LAYOUT | "4 ranks" …
    these cases, or all cases of a number of ranks; only printed
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from longhaul.errors import UserError
from tests.parity import reference_loop
from tests.parity.parity_cases import BF16, FP32, LAYOUTS, TABLES, TASKS, Case, all_cases
from tests.parity.prepare_case import STEPS, prepare_case, run_config
from tests.parity.tokenizer_and_shards import write_shared_data
from tests.support.launch_ranks import launch_worker

HERE = Path(__file__).resolve().parent
_ports = count(20_000 + os.getpid() * 211 % 10_000)
"""Ports below the range that the kernel uses for outgoing connections."""


@dataclass(frozen=True)
class CaseResult:
    """Largest relative differences of a case, and a summary of its export's verification; `problem` is empty on success."""

    model: str
    layout: str
    loss: float = float("nan")
    norm: float = float("nan")
    validation: float = float("nan")
    logits: float = float("nan")
    verification: str = ""
    problem: str = ""

    def line(self) -> str:
        """Return the case's line of the table."""
        differences = {
            "loss": self.loss,
            "grad norm": self.norm,
            "validation": self.validation,
            "logits": self.logits,
        }
        numbers = "  ".join(f"{name} {value:8.1e}" for name, value in differences.items())
        return f"{self.model:18} {self.layout:52} {numbers}  {self.verification:24} {self.problem or 'agrees'}"


def run_cases(cases: list[Case], folder: Path) -> list[CaseResult]:
    """Train and compare cases."""
    shared = write_shared_data(folder / "shared")
    with ThreadPoolExecutor(1) as executor:  # in parallel to the ranks, which mostly wait for one another
        kinds = dict.fromkeys(map(reference_of, cases))
        references = {kind: executor.submit(train_reference, kind, shared, folder) for kind in kinds}
        failures = {case: train_case(case, shared, folder) for case in cases}
        traces = {kind: reference.result() for kind, reference in references.items()}
    return [compare_case(case, traces[reference_of(case)], shared, folder, failures[case]) for case in cases]


def train_case(case: tuple[str, ...], shared: Path, folder: Path) -> str:
    """Train a case in processes of its own, as users do: DeepSpeed replaces functions of torch for the rest of a process.

    Returns the end of the ranks' output if they failed, else "".

    case: parts of the case name of parity_worker.py
    """
    ranks, worker = LAYOUTS[case[1]].ranks, HERE / "parity_worker.py"
    environment = {"PORT_OF_RESUME": str(next(_ports))}
    done = launch_worker(
        worker, ranks, str(shared), str(folder), "/".join(case), environment=environment, timeout_s=900
    )
    return (done.stdout + done.stderr)[-6000:] if done.returncode else ""


def reference_of(case: Case) -> tuple[str, str]:
    """Return (model, task): what the reference loop trains for a case."""
    return case[0], LAYOUTS[case[1]].task


def train_reference(kind: tuple[str, str], shared: Path, folder: Path) -> reference_loop.Trace:
    """Train (model, task) with the reference loop; ValueError if rounding alone changes the result."""
    import torch

    from longhaul.artifacts.artifact_schemas import DataManifest
    from longhaul.data.sampling.samples import Samples

    torch.set_num_threads(1)
    model, task = kind
    own = folder / model / f"reference {task}"
    job, _ = prepare_case(own, shared, run_config(model, "one rank", **TASKS[task]))
    manifest, stage = DataManifest.read(Path(job.data)), job.stage
    samples, held_out = (
        Samples.open(manifest, split, stage.kind, stage.sequence_length, job.seed, own / "samples")
        for split in ("train", "validation")
    )
    trace, perturbed = (reference_loop.train(job, samples, held_out, perturb) for perturb in (False, True))
    _check_sensitivity(f"{model}, {task}", trace, perturbed)
    return trace


def _check_sensitivity(name: str, trace: reference_loop.Trace, perturbed: reference_loop.Trace) -> None:
    """Refuse a seed with which rounding alone changes the losses: it may send a token to another of two equal experts."""
    difference = max(
        largest_difference(perturbed.losses, trace.losses), largest_difference(perturbed.norms, trace.norms)
    )
    if difference > FP32.norm / 10:
        raise ValueError(
            f"{name}: a change of all weights by one unit in the last place changes losses or gradient norms by "
            f"{difference:.1e}, more than a tenth of the bound {FP32.norm:g}; choose another SEED"
        )


def compare_case(case: Case, trace: reference_loop.Trace, shared: Path, folder: Path, failure: str) -> CaseResult:
    """Compare a trained case with the reference, export and verify it."""
    if failure:
        return CaseResult(*case, problem=f"failed\n{failure}")
    own = folder / case[0] / case[1]
    rows = step_metrics(own)
    if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
        return CaseResult(*case, problem=f"has metrics of steps {[row['step'] for row in rows]}")
    loss = largest_difference([row["loss"] for row in rows], trace.losses)
    norm = largest_difference([row["grad_norm"] for row in rows], trace.norms)
    validation = largest_difference(validation_losses(own)[-1:], [trace.validation_loss])
    try:
        logits, verification = _export(case, trace, shared, own)
    except UserError as error:
        return CaseResult(*case, loss, norm, validation, problem=f"is not exported: {error}")
    bounds = LAYOUTS[case[1]].bounds
    measured = {
        "loss": (loss, bounds.loss),
        "grad norm": (norm, bounds.norm),
        "validation": (validation, bounds.loss),
        "logits": (logits, bounds.logits),
    }
    differing = [name for name, (value, bound) in measured.items() if not value <= bound]
    problem = f"differs in {', '.join(differing)}" if differing else ""
    return CaseResult(*case, loss, norm, validation, logits, verification, problem)


def step_metrics(case_folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of every optimizer step of a trained case."""
    return [row for row in _metrics(case_folder) if "loss" in row]


def validation_losses(case_folder: Path) -> list[float]:
    """Return the validation losses of a trained case."""
    return [row["validation_loss"] for row in _metrics(case_folder) if "validation_loss" in row]


def _metrics(case_folder: Path) -> list[dict[str, Any]]:
    files = case_folder.glob("stages/main/weights/*/metrics.jsonl")
    return [json.loads(line) for path in files for line in path.open()]


def largest_difference(values: list[float], expected: list[float]) -> float:
    """Return the largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))


def _export(case: Case, trace: reference_loop.Trace, shared: Path, own: Path) -> tuple[float, str]:
    """Export and verify the last checkpoint.

    Returns the relative difference of the export's logits from those of the reference model, and a summary of the verification.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from longhaul.export import export_checkpoint

    _, job = prepare_case(own, shared, run_config(*case))
    export_checkpoint.run(job)
    verification = json.loads(Path(job.out).read_text())["verification"]
    model = AutoModelForCausalLM.from_pretrained(
        f"{job.folder}/latest", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    (prompts,) = own.glob(f"stages/main/weights/*/checkpoints/step-{STEPS:08d}/reference/logits.safetensors")
    ids = load_file(prompts)["input_ids"]
    with torch.no_grad():
        logits, expected = (one(input_ids=ids, use_cache=False).logits for one in (model, trace.model))
    compared = verification["logits"]
    summary = "bits" if compared["bit_equal"] else f"{compared['max_abs_difference']:.0e}"
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    return difference, f"{verification['tensors']['equal']} tensors, logits {summary}"


def main() -> int:
    """Print the lines of the chosen cases and write complete tables; return the number of failed cases."""
    names = sys.argv[1:] or list(TABLES)
    if names[0] not in TABLES:
        cases = [case for case in all_cases() if {"/".join(case), f"{LAYOUTS[case[1]].ranks} ranks"} & set(names)]
        assert cases, f"no case has one of the names {names}"
        lines, failed = result_lines(cases)
        print(*lines, sep="\n")
        return failed
    from bench.machine import describe_machine, write_result

    failed_in_all = 0
    for name in names:
        lines, failed = result_lines(TABLES[name])
        write_result(name, [*describe_machine(("torch", "deepspeed", "transformers")), *lines])
        failed_in_all += failed
    return failed_in_all


def result_lines(cases: list[Case]) -> tuple[list[str], int]:
    """Run the cases; return one line for each and a summary, and the number of failed cases."""
    with tempfile.TemporaryDirectory() as folder:
        results = run_cases(cases, Path(folder))
    failed = sum(bool(result.problem) for result in results)
    summary = (
        f"{len(results) - failed} of {len(results)} cases agree with the plain PyTorch loop: losses and gradient norms to "
        f"{FP32.loss:g} relative in fp32; in bf16 losses to {BF16.loss:g}, norms to {BF16.norm:g}"
    )
    return [*(result.line() for result in results), summary], failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
