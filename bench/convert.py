"""Compares the speed of the conversion with zero_to_fp32 plus save_pretrained, and with copying the same bytes.

A checkpoint of ZeRO stage 3 over 4 ranks, with fp32 master weights and Adam's moments, becomes a folder of bf16 safetensors.
Each round is a process of its own. Its time begins when imports are done and the master weights are in the page cache, from
which an earlier process may have evicted them. It ends when the files are on the disk. The copy reads the bytes of the master
weights and writes as many bytes as the export has. Verification of the checkpoint and of the export is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bench.machine import MODULE_PATH, describe_machine, write_result
from longhaul.checkpoint_io import open_master_weights
from longhaul.export.exported_tensors import list_exported_tensors
from longhaul.export.model_without_memory import hugging_face_config, meta_model
from longhaul.export.safetensors_writer import write_shards

RANKS, ROUNDS = 4, 7
BLOCK_BYTES = 4 << 20


def main() -> None:
    """Write the checkpoint, alternate the three conversions, compare their outputs, and print medians and ratios."""
    arguments = _arguments()
    if arguments.run:
        _run(arguments.run, Path(arguments.checkpoint), Path(arguments.out))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        weights = Path(name) / "weights"
        parameters = _write_checkpoint(weights, arguments)
        found = _measure_alternating(weights, Path(name))
    _publish(found, parameters)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=40_000)
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), help="a folder with 25 bytes of free space per parameter"
    )
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_checkpoint(weights: Path, arguments: argparse.Namespace) -> int:
    """Write the checkpoint in another process, so that this one stays small. Return the number of parameters."""
    script = f"""
import sys
from pathlib import Path
from longhaul.export.model_without_memory import meta_model
from tests.support.synthetic_checkpoints import llama_config, write_checkpoint
config = llama_config(*map(int, sys.argv[2:]))
write_checkpoint(Path(sys.argv[1]), config, ranks={RANKS}, moments=True)
print(meta_model(config).num_parameters())
"""
    sizes = [str(value) for value in (arguments.layers, arguments.hidden, arguments.vocabulary)]
    command = [sys.executable, "-c", script, str(weights), *sizes]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    os.sync()
    return int(done.stdout.split()[-1])


def _measure_alternating(weights: Path, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return the measurements of each conversion. Each round begins with another one. The outputs are compared first."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    names = list(RUNS)
    outputs = [folder / str(index) for index in range(2)]
    for name, out in zip(names, outputs, strict=False):
        _run_in_process(name, weights, out)
    _compare(*outputs)
    _remove(*outputs)
    for index in range(ROUNDS):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            found[name].append(_run_in_process(name, weights, outputs[0]))
            _remove(outputs[0])
    return found


def _run_in_process(name: str, weights: Path, out: Path) -> dict[str, float]:
    out.mkdir()
    command = [sys.executable, "-m", "bench.convert", "--run", name, "--checkpoint", str(weights), "--out", str(out)]
    environment = {**os.environ, **MODULE_PATH, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _remove(*outputs: Path) -> None:
    """Remove outputs and flush the disk, so that the next round starts with idle memory and disk."""
    for out in outputs:
        shutil.rmtree(out)
    os.sync()


def _run(name: str, weights: Path, out: Path) -> None:
    convert = RUNS[name](weights, out)
    for _ in _blocks_of_masters(weights):
        pass
    started = time.perf_counter()
    convert()
    for path in out.glob("*"):
        _flush_to_disk(path)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak_mib": peak / 1024}))


def _flush_to_disk(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _longhaul(weights: Path, out: Path) -> Callable[[], None]:
    config = json.loads((weights / "model_config.json").read_text())
    meta_model(config)  # imports the architecture

    def convert() -> None:
        masters = open_master_weights(_checkpoint(weights))
        write_shards(out, list_exported_tensors(meta_model(config), meta_model(config), masters, torch.bfloat16))
        hugging_face_config(config).save_pretrained(out)

    return convert


def _peer(weights: Path, out: Path) -> Callable[[], None]:
    """Convert as their documentation describes: to fp32 files first; transformers loads, casts and saves these."""
    import transformers
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    transformers.logging.disable_progress_bar()
    config = hugging_face_config(json.loads((weights / "model_config.json").read_text()))
    architecture: Any = transformers.LlamaForCausalLM
    between = out / "fp32"

    def convert() -> None:
        checkpoint = _checkpoint(weights)
        convert_zero_checkpoint_to_fp32_state_dict(
            str(checkpoint.parent), str(between), safe_serialization=True, tag=checkpoint.name
        )
        config.save_pretrained(between)
        model = architecture.from_pretrained(between, dtype=torch.bfloat16)
        model.save_pretrained(out)

    return convert


def _copy(weights: Path, out: Path) -> Callable[[], None]:
    """Read all bytes of the master weights, and write half of each block."""

    def convert() -> None:
        with (out / "copy").open("wb", buffering=0) as target:
            for block in _blocks_of_masters(weights):
                target.write(block[: len(block) // 2])

    return convert


def _blocks_of_masters(weights: Path) -> Iterator[memoryview]:
    """Yield all bytes of the master weights. Each block overwrites the one before."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for tensor in open_master_weights(_checkpoint(weights)).values():
        for piece in tensor.pieces:
            size = piece.numel * piece.dtype.itemsize
            with piece.path.open("rb", buffering=0) as stream:
                stream.seek(piece.offset_bytes)
                for start in range(0, size, BLOCK_BYTES):
                    yield buffer[: stream.readinto(buffer[: size - start]) or 0]


RUNS = {"longhaul": _longhaul, "zero_to_fp32 + transformers": _peer, "copy": _copy}


def _checkpoint(weights: Path) -> Path:
    return next((weights / "checkpoints").iterdir())


def _compare(*folders: Path) -> None:
    """Exit with an error unless both folders hold the same tensors, bit for bit."""
    ours, theirs = map(_tensors, folders)
    if set(ours) != set(theirs):
        raise SystemExit(f"the outputs differ in {sorted(set(ours) ^ set(theirs))[:3]}")
    for name, file in ours.items():
        if not torch.equal(file.get_tensor(name), theirs[name].get_tensor(name)):
            raise SystemExit(f"{name} differs")


def _tensors(folder: Path) -> dict[str, Any]:
    files = [safe_open(path, "pt") for path in folder.glob("*.safetensors")]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)


def _publish(found: dict[str, list[dict[str, float]]], parameters: int) -> None:
    lines = []
    for name, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        peak = max(run["peak_mib"] for run in runs)
        lines.append(
            f"{name:28} {statistics.median(seconds):7.2f} s, median of {len(seconds)} "
            f"(from {min(seconds):.2f} to {max(seconds):.2f}); peak RSS {peak:,.0f} MiB"
        )
    ours, peer, copy = ([run["seconds"] for run in found[name]] for name in RUNS)
    faster = [theirs / mine for theirs, mine in zip(peer, ours, strict=True)]
    slower = [mine / plain for mine, plain in zip(ours, copy, strict=True)]
    write_result(
        "convert",
        [
            *describe_machine(("torch", "deepspeed", "transformers", "safetensors")),
            f"{parameters / 1e9:.2f} billion parameters, ZeRO 3 over {RANKS} ranks, fp32 masters and moments, to bf16; "
            "tensors of both conversions bit-equal",
            *lines,
            f"zero_to_fp32 + transformers / longhaul: {statistics.median(faster):.2f}, median of {len(faster)} pairs "
            f"(from {min(faster):.2f} to {max(faster):.2f}); aim: >= 5",
            f"longhaul / copy: {statistics.median(slower):.2f}, median of {len(slower)} pairs "
            f"(from {min(slower):.2f} to {max(slower):.2f}); aim: <= 1.15",
        ],
    )


if __name__ == "__main__":
    main()
