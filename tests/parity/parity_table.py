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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longhaul.errors import UserError
from tests.parity import reference_loop
from tests.parity.parity_cases import BF16, FP32, LAYOUTS, TABLES, Case, all_cases
from tests.parity.prepare_case import STEPS, prepare_case, run_config
from tests.parity.shared_data import write_shared_data
from tests.support.ranks import launch_worker

HERE = Path(__file__).resolve().parent
_CASES_PER_LAUNCH = 12
"""gloo keeps three threads for every process group of earlier cases; hundreds of threads slow down the later cases."""


@dataclass(frozen=True)
class CaseResult:
    """Largest relative differences of a case, and a summary of its export's verification; `problem` is empty on success."""

    model: str
    layout: str
    loss: float = float("nan")
    norm: float = float("nan")
    logits: float = float("nan")
    verification: str = ""
    problem: str = ""

    def line(self) -> str:
        """Return the case's line of the table."""
        numbers = f"loss {self.loss:8.1e}  grad norm {self.norm:8.1e}  logits {self.logits:8.1e}"
        return f"{self.model:12} {self.layout:48} {numbers}  {self.verification:24} {self.problem or 'agrees'}"


def run_cases(cases: list[Case], folder: Path) -> list[CaseResult]:
    """Train and compare cases; those of one world size share their processes."""
    shared = write_shared_data(folder / "shared")
    failures: dict[tuple[str, ...], str] = {}
    with ThreadPoolExecutor(1) as executor:  # in parallel to the ranks, which mostly wait for one another
        models = dict.fromkeys(model for model, _ in cases)
        references = {model: executor.submit(train_reference, model, shared, folder) for model in models}
        for ranks in sorted({LAYOUTS[layout].ranks for _, layout in cases}):
            same_ranks = [case for case in cases if LAYOUTS[case[1]].ranks == ranks]
            for first in range(0, len(same_ranks), _CASES_PER_LAUNCH):
                failures |= train_cases(ranks, same_ranks[first : first + _CASES_PER_LAUNCH], shared, folder)
        traces = {model: reference.result() for model, reference in references.items()}
    return [compare_case(case, traces[case[0]], shared, folder, failures.get(case, "")) for case in cases]


def train_cases(ranks: int, cases: Sequence[tuple[str, ...]], shared: Path, folder: Path) -> dict[tuple[str, ...], str]:
    """Train cases in one set of processes; return case -> output of a failure. After a failure, new processes train the rest.

    cases: parts of the case names of parity_worker.py
    """
    failures: dict[tuple[str, ...], str] = {}
    while cases:
        names = ["/".join(case) for case in cases]
        environment = {"PARITY_PORT": str(_first_port())}
        done = launch_worker(
            HERE / "parity_worker.py", ranks, str(shared), str(folder), *names, environment=environment, timeout_s=1500
        )
        if done.returncode == 0:
            break
        output = done.stdout + done.stderr
        failed = next((line for line in output.splitlines() if line.startswith("FAILED ")), "")
        index = names.index(failed.removeprefix("FAILED ")) if failed else 0
        of_first_rank = output[output.find("FAILED ") :].split("\n\n")[0]
        failures[cases[index]] = of_first_rank[-6000:] if failed else output[-6000:]
        cases = cases[index + 1 :]
    return failures


def _first_port() -> int:
    """Return the first of many consecutive ports below the range that the kernel uses for outgoing connections."""
    return 20_000 + os.getpid() * 211 % 10_000


def train_reference(model: str, shared: Path, folder: Path) -> reference_loop.Trace:
    """Train the model with the reference loop; ValueError if rounding alone changes the result."""
    import torch

    from longhaul.artifacts.artifact_schemas import DataManifest
    from longhaul.data.sampling.samples import Samples

    torch.set_num_threads(1)
    job, _ = prepare_case(folder / model / "reference", shared, run_config(model, "one rank"))
    manifest, stage = DataManifest.read(Path(job.data)), job.stage
    cache = folder / model / "reference" / "samples"
    samples = Samples.open(manifest, "train", stage.kind, stage.sequence_length, job.seed, cache)
    trace, perturbed = (reference_loop.train(job, samples, perturb) for perturb in (False, True))
    _check_sensitivity(model, trace, perturbed)
    return trace


def _check_sensitivity(model: str, trace: reference_loop.Trace, perturbed: reference_loop.Trace) -> None:
    """Refuse a seed with which rounding alone changes the losses: it may send a token to another of two equal experts."""
    difference = max(
        largest_difference(perturbed.losses, trace.losses), largest_difference(perturbed.norms, trace.norms)
    )
    if difference > FP32.norm / 10:
        raise ValueError(
            f"{model}: a change of all weights by one unit in the last place changes losses or gradient norms by "
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
    try:
        logits, verification = _export(case, trace, shared, own)
    except UserError as error:
        return CaseResult(*case, loss, norm, problem=f"is not exported: {error}")
    bounds = LAYOUTS[case[1]].bounds
    measured = {"loss": (loss, bounds.loss), "grad norm": (norm, bounds.norm), "logits": (logits, bounds.logits)}
    differing = [name for name, (value, bound) in measured.items() if not value <= bound]
    problem = f"differs in {', '.join(differing)}" if differing else ""
    return CaseResult(*case, loss, norm, logits, verification, problem)


def step_metrics(case_folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of every optimizer step of a trained case."""
    files = case_folder.glob("stages/main/weights/*/metrics.jsonl")
    rows = [json.loads(line) for path in files for line in path.open()]
    return [row for row in rows if "loss" in row]


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
