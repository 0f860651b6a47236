"""Compares a save with writing the same bytes raw, and measures how long training waits for it.

The files are those of one rank of ZeRO 1: the weights in bf16, and fp32 master weights with two moments. They are written in
turns: raw, with one thread that hashes and then writes, and as the trainer does. Every time ends when the bytes are on the
disk. The stall is the time of the snapshot; on a GPU the copies run during the training, and `copied` is when they end.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import torch
from blake3 import blake3

from bench.machine import describe_machine, write_result
from longhaul.train.checkpoint.checkpoint_file_writer import WriterThreads
from longhaul.train.checkpoint.host_snapshot import HostMemory
from longhaul.train.checkpoint.rank_files import RankFiles

RAW_THREADS, PART_BYTES = 8, 32 << 20
Times = dict[str, float]


def main() -> None:
    """Alternate the three ways to write, and print medians and ratios."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = _files(arguments.parameters, device)
    threads, memory = WriterThreads(), HostMemory(device)
    found: dict[str, list[Times]] = {"raw": [], "one thread": [], "trainer": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name) / "save"
        writers: dict[str, Callable[[], Times]] = {
            "raw": lambda: _raw(folder, 14 * arguments.parameters),
            "one thread": lambda: _one_thread(folder, files),
            "trainer": lambda: _trainer(folder, files, threads, memory),
        }
        folder.mkdir()
        writers["trainer"]()  # the first save reserves memory and does not count
        shutil.rmtree(folder)
        for _ in range(arguments.rounds):
            for way, write in writers.items():
                folder.mkdir()
                found[way].append(write())
                shutil.rmtree(folder)
    threads.stop()
    _publish(found, arguments, device)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=70_000_000, help="14 bytes each are saved")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    return parser.parse_args()


def _files(parameters: int, device: torch.device) -> dict[str, Any]:
    """Return the contents of a rank's two large files by name."""
    layers, states = 100, [torch.rand(parameters, device=device) for _ in range(3)]
    weights = {f"layer.{i}": part.bfloat16() for i, part in enumerate(states[0].chunk(layers))}
    return {"model_states.pt": {"module": weights}, "optim_states.pt": dict(zip("pmv", states, strict=True))}


def _raw(folder: Path, size: int) -> Times:
    """Write as many bytes with several threads, without a hash."""
    part = memoryview(random.randbytes(PART_BYTES))
    started = time.perf_counter()
    handle = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT, 0o666)

    def write(offset: int) -> None:
        os.pwrite(handle, part[: size - offset], offset)
        os.posix_fadvise(handle, offset, PART_BYTES, os.POSIX_FADV_DONTNEED)

    with ThreadPoolExecutor(RAW_THREADS) as pool:
        list(pool.map(write, range(0, size, PART_BYTES)))
    os.fsync(handle)
    os.close(handle)
    return {"durable": time.perf_counter() - started}


def _one_thread(folder: Path, files: dict[str, Any]) -> Times:
    """Hash and write one file after the other, as a synchronous save with one thread does."""
    started = time.perf_counter()
    for name, values in files.items():
        with (folder / name).open("wb", buffering=0) as stream:
            torch.save(values, cast(IO[bytes], _Hashing(stream)))
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    return {"stall": seconds, "durable": seconds}


class _Hashing:
    def __init__(self, stream: Any) -> None:
        self._stream, self._hash = stream, blake3()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        while view:
            view = view[self._stream.write(view) :]
        return len(data)

    def flush(self) -> None:
        pass


def _trainer(folder: Path, files: dict[str, Any], threads: WriterThreads, memory: HostMemory) -> Times:
    started = time.perf_counter()
    save = RankFiles(threads, memory)
    for name, values in files.items():
        save.save(values, folder / name)
    save.take_snapshot()
    stall = time.perf_counter() - started
    memory.wait()
    copied = time.perf_counter() - started
    save.write()
    failure = save.failure()
    if failure:
        raise OSError(failure[1])
    return {"stall": stall, "copied": copied, "durable": time.perf_counter() - started}


def _publish(found: dict[str, list[Times]], arguments: argparse.Namespace, device: torch.device) -> None:
    parameters = arguments.parameters
    medians = {way: {key: statistics.median(t[key] for t in times) for key in times[0]} for way, times in found.items()}
    raw = medians["raw"]["durable"]
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = [
        *describe_machine(("torch", "deepspeed")),
        f"{title}, {14 * parameters / 1e9:.2f} GB, median of {arguments.rounds} alternating rounds, seconds",
        "",
        f"{'':12}{'stall':>8}{'copied':>8}{'durable':>9}{'GB/s':>7}{'durable / raw':>15}",
    ]
    for way, times in medians.items():
        parts = [f"{times[key]:.3f}" if key in times else "-" for key in ("stall", "copied")]
        rate, ratio = 14 * parameters / 1e9 / times["durable"], times["durable"] / raw
        lines.append(f"{way:12}{parts[0]:>8}{parts[1]:>8}{times['durable']:>9.3f}{rate:>7.2f}{ratio:>15.2f}")
    write_result("save" if device.type == "cpu" else "gpu_save", lines)


if __name__ == "__main__":
    main()
