"""Trains cells of the parity table, compares them with the reference and prints every one.

python parity_table.py [parity | parity_relatives]: both tables of layouts.py or one, kept in bench/results;
python parity_table.py TWIN/LAYOUT | "4 ranks" …: these cells, printed."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longhaul.errors import UserError
from tests.parity import reference_loop as reference
from tests.parity.parity_cases import BF16, FP32, LAYOUTS, TABLES, cells
from tests.parity.run_parity_case import STEPS, config, prepare
from tests.support.corpora import conversation, dataset, make_shards, make_tokenizer, write_jsonl
from tests.support.ranks import launch

HERE = Path(__file__).resolve().parent
_CELLS_A_LAUNCH = 12
"""gloo keeps three threads for every group that a cell made, and hundreds of them slow the cells that follow."""


@dataclass(frozen=True)
class Result:
    """What came of a cell: largest relative differences, and the export's proof; `problem` is empty when all holds."""

    twin: str
    layout: str
    loss: float = float("nan")
    norm: float = float("nan")
    logits: float = float("nan")
    proof: str = ""
    problem: str = ""

    def line(self) -> str:
        verdict = self.problem or "agrees"
        numbers = f"loss {self.loss:8.1e}  grad norm {self.norm:8.1e}  logits {self.logits:8.1e}"
        return f"{self.twin:12} {self.layout:38} {numbers}  {self.proof:24} {verdict}"


def make_data(folder: Path) -> Path:
    """Tokenizer and shards that all cells share: packs of one conversation that is cut, and of several short ones."""
    folder.mkdir(parents=True)
    texts = [part["content"] for i in range(60) for part in conversation(i)]
    make_tokenizer(folder, [write_jsonl(folder / "corpus.jsonl", "text", texts)], chat_template=str(CHATML))
    talks = [conversation(i, 1 + i % 2) if i % 4 == 0 else _exchange(i) for i in range(360)]
    chats = write_jsonl(folder / "chats.jsonl", "messages", talks)
    make_shards(folder, folder, [chats], dataset("chat", validation_fraction=0.1))
    return folder


def _exchange(number: int) -> list[dict[str, Any]]:
    """So short that two or three are a sample."""
    return [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"{7 * number}."}]


CHATML = HERE.parents[1] / "templates" / "chat" / "chatml.jinja"


def run(chosen: list[tuple[str, str]], folder: Path) -> list[Result]:
    """Trains and judges cells; those of one world size share their processes."""
    shared = make_data(folder / "shared")
    failures: dict[tuple[str, ...], str] = {}
    with ThreadPoolExecutor(1) as beside:  # ranks wait for one another more than they compute
        twins = dict.fromkeys(twin for twin, _ in chosen)
        found = {twin: beside.submit(_reference, twin, shared, folder) for twin in twins}
        for ranks in sorted({LAYOUTS[layout].ranks for _, layout in chosen}):
            same: list[tuple[str, ...]] = [cell for cell in chosen if LAYOUTS[cell[1]].ranks == ranks]
            for first in range(0, len(same), _CELLS_A_LAUNCH):
                failures |= train(ranks, same[first : first + _CELLS_A_LAUNCH], shared, folder)
        traces = {twin: reference.result() for twin, reference in found.items()}
    return [_judge(cell, traces[cell[0]], shared, folder, failures.get(cell, "")) for cell in chosen]


def train(ranks: int, chosen: list[tuple[str, ...]], shared: Path, folder: Path) -> dict[tuple[str, ...], str]:
    """Trains the cells in one set of processes; after one that fails, the others go on in new ones."""
    failures = {}
    while chosen:
        names = ["/".join(cell) for cell in chosen]
        environment = {"PARITY_PORT": str(_ports())}
        done = launch(
            HERE / "parity_worker.py", ranks, str(shared), str(folder), *names, environment=environment, timeout_s=1500
        )
        if done.returncode == 0:
            break
        output = done.stdout + done.stderr
        failed = next((line for line in output.splitlines() if line.startswith("FAILED ")), "")
        index = names.index(failed.removeprefix("FAILED ")) if failed else 0
        told = output[output.find("FAILED ") :].split("\n\n")[0]  # the first rank that failed
        failures[chosen[index]] = told[-6000:] if failed else output[-6000:]
        chosen = chosen[index + 1 :]
    return failures


def _ports() -> int:
    """The first of many neighbouring ports, below those that the kernel gives to outgoing connections."""
    return 20_000 + os.getpid() * 211 % 10_000


def _reference(twin: str, shared: Path, folder: Path) -> Any:
    import torch

    from longhaul.artifacts.schemas import DataManifest
    from longhaul.data.sampling.samples import Samples

    torch.set_num_threads(1)
    job, _ = prepare(folder / twin / "reference", shared, config(twin, "one"))
    manifest, stage = DataManifest.read(Path(job.data)), job.stage
    cache = folder / twin / "reference" / "samples"
    samples = Samples.open(manifest, "train", stage.kind, stage.sequence_length, job.seed, cache)
    return _well_posed(twin, *(reference.train(job, samples, nudged) for nudged in (False, True)))


def _well_posed(twin: str, trace: Any, nudged: Any) -> Any:
    """The trace, unless rounding alone moves it: a token that lies near a tie of two experts goes where rounding sends it."""
    moved = max(furthest(nudged.losses, trace.losses), furthest(nudged.norms, trace.norms))
    if moved > FP32.norm / 10:
        told = f"{twin}: weights moved by a unit in the last place move losses or gradient norms by {moved:.1e}"
        raise ValueError(f"{told}, too near the {FP32.norm:g} that layouts are held to; choose another SEED")
    return trace


def _judge(cell: tuple[str, str], trace: Any, shared: Path, folder: Path, failure: str) -> Result:
    if failure:
        return Result(*cell, problem=f"failed\n{failure}")
    own = folder / cell[0] / cell[1]
    rows = steps(own)
    if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
        return Result(*cell, problem=f"steps {[row['step'] for row in rows]}")
    loss = furthest([row["loss"] for row in rows], trace.losses)
    norm = furthest([row["grad_norm"] for row in rows], trace.norms)
    try:
        logits, proof = _export(cell, trace, shared, own)
    except UserError as error:
        return Result(*cell, loss, norm, problem=f"not exported: {error}")
    bounds = LAYOUTS[cell[1]].bounds
    limits = {"loss": (loss, bounds.loss), "grad norm": (norm, bounds.norm), "logits": (logits, bounds.logits)}
    wrong = [name for name, (value, most) in limits.items() if not value <= most]
    return Result(*cell, loss, norm, logits, proof, f"differs in {', '.join(wrong)}" if wrong else "")


def steps(cell: Path) -> list[dict[str, Any]]:
    """The metrics of every step of a cell that was trained in this folder."""
    rows = [json.loads(line) for path in cell.glob("stages/main/weights/*/metrics.jsonl") for line in path.open()]
    return [row for row in rows if "loss" in row]


def furthest(found: list[float], wanted: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def _export(cell: tuple[str, str], trace: Any, shared: Path, own: Path) -> tuple[float, str]:
    """Exports the last checkpoint with its proof; logits of the exported model against the reference's, relative."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from longhaul.export import export_checkpoint as export

    _, job = prepare(own, shared, config(*cell))
    export.run(job)
    proof = json.loads(Path(job.out).read_text())["proof"]
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    (prompts,) = own.glob(f"stages/main/weights/*/checkpoints/step-{STEPS:08d}/proof/logits.safetensors")
    ids = load_file(prompts)["input_ids"]
    with torch.no_grad():
        found, wanted = (one(input_ids=ids, use_cache=False).logits for one in (model, trace.model))
    stated = "bits" if proof["logits"]["bit_equal"] else f"{proof['logits']['max_abs_difference']:.0e}"
    difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
    return difference, f"{proof['tensors']['equal']} tensors, logits {stated}"


def main() -> int:
    """Prints every cell as it was judged, and keeps whole tables; returns how many failed."""
    names = sys.argv[1:] or list(TABLES)
    if names[0] not in TABLES:
        chosen = [cell for cell in cells() if {"/".join(cell), f"{LAYOUTS[cell[1]].ranks} ranks"} & set(names)]
        assert chosen, f"no cell is called {names}"
        lines, bad = judged(chosen)
        print(*lines, sep="\n")
        return bad
    from bench.machine import header, publish

    failed = 0
    for name in names:
        lines, bad = judged(TABLES[name])
        publish(name, [*header(("torch", "deepspeed", "transformers")), *lines])
        failed += bad
    return failed


def judged(chosen: list[tuple[str, str]]) -> tuple[list[str], int]:
    """A line for each cell and a verdict, and how many failed."""
    with tempfile.TemporaryDirectory() as folder:
        results = run(chosen, Path(folder))
    bad = sum(bool(result.problem) for result in results)
    verdict = (
        f"{len(results) - bad} of {len(results)} cells agree with the plain PyTorch loop: losses and gradient norms to "
        f"{FP32.loss:g} relative in fp32; in bf16 losses to {BF16.loss:g}, norms to {BF16.norm:g}"
    )
    return [*(result.line() for result in results), verdict], bad


if __name__ == "__main__":
    sys.exit(min(main(), 1))
