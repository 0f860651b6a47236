"""Measures the time from raw text to shards on two cores: longhaul, `datasets` map, datatrove, Megatron-LM and the raw limit.

Times are wall-clock times with start-up, medians of alternating rounds. No package that pip installs contains Megatron-LM's
tools/preprocess_data.py: MEGATRON=<checkout of NVIDIA/Megatron-LM> adds it.
"""

from __future__ import annotations

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

import numpy as np

from bench.machine import describe_machine, write_result
from longhaul.artifacts.artifact_schemas import DataManifest, TokenizerManifest
from longhaul.config.dataset_config import Dataset
from longhaul.data.shards.indexed_dataset import token_dtype
from longhaul.data.shards.shard_reader import SplitReader
from longhaul.jobs.kinds.tokenize_jobs import TokenizeSpec

ROUNDS = 3
SHORT_RUNS_PER_ROUND = 5  # of commands that take seconds: noise affects them more than those that take minutes
CORPUS_BYTES = 400_000_000
MEGATRON = os.environ.get("MEGATRON", "")
PEERS = Path(sys.prefix).parent / ".venv-bench" / "bin" / "python"
AIMS = {"datasets": 20, "datatrove": 12, "megatron": 35}
TIMEOUT_S = 3600  # Megatron-LM's main process never ends when its child fails
# longhaul without the reference encoder and without any comparison with it; forked workers inherit these changes.
UNCHECKED = (
    "import sys; from longhaul.data.shards import source_index, tokenize_dataset; "
    "from longhaul.data.tokenizers.document_encoder import DocumentEncoder; "
    "source_index.choose_encoder = lambda *_: source_index.EncoderChoice('gigatoken', ''); "
    "DocumentEncoder.check = lambda *_: None; "
    "tokenize_dataset.encode_stress_corpus = lambda *_: (); tokenize_dataset.load_reference = lambda _: None; "
    "from longhaul.cli import main; main(['job', 'run', 'tokenize', sys.argv[1]])"
)
EOS = "<｜end▁of▁sentence｜>"


def main() -> None:
    """Print medians and ratios, and compare every id of the corpus with AutoTokenizer's."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        folder = Path(name)
        corpus = write_corpus(folder)
        tokenizer = write_tokenizer(folder)
        job = str(write_job(folder, corpus))

        def peer(kind: str) -> list[str]:
            return [str(PEERS), str(Path(__file__).with_name("data_peers.py")), kind, name]

        ours = [sys.executable, "-m", "longhaul", "job", "run", "tokenize", job]
        short = {
            "longhaul without the check": [sys.executable, "-c", UNCHECKED, job],
            "raw": peer("raw"),
            "longhaul": ours,
        }
        long = {"datasets": peer("datasets"), "datatrove": peer("datatrove"), **megatron_command(folder, corpus)}
        seconds: dict[str, list[float]] = {kind: [] for kind in (*short, *long)}
        for _ in range(ROUNDS):
            for kind, words in [*short.items()] * SHORT_RUNS_PER_ROUND + [*long.items()]:
                if kind.startswith("longhaul"):
                    shutil.rmtree(folder / "shards", ignore_errors=True)
                seconds[kind].append(timed(words, folder))
        manifest = DataManifest.read(folder / "shards.json")
        expected = list(reference_ids(tokenizer, corpus))
        lines = [
            *describe_machine(("gigatoken", "tokenizers", "orjson", "numpy")),
            f"corpus: {corpus.stat().st_size / 1e6:.0f} MB of jsonl, {manifest.sources[0]['documents']:,} documents, "
            f"{sum(split['tokens'] for split in manifest.splits.values()):,} tokens, DeepSeek's byte-level BPE",
            f"wall-clock s with start-up, 2 cores, median of {ROUNDS} alternating rounds; short commands run "
            f"{SHORT_RUNS_PER_ROUND} times per round:",
            *(
                f"  {kind}: {statistics.median(found):.2f} ({', '.join(f'{s:.2f}' for s in found)})"
                for kind, found in seconds.items()
            ),
            *ratio_lines(seconds),
            f"encoder: {manifest.encoder['name']}",
            f"peak resident memory of longhaul's largest process: {peak_mb(ours, folder):.0f} MB",
            f"ids equal to AutoTokenizer's: {compare(manifest, expected)}",
            *megatron_lines(folder, expected, tokenizer),
        ]
    write_result("data", lines)


def ratio_lines(seconds: dict[str, list[float]]) -> Iterator[str]:
    """Return the ratios of the medians to longhaul's."""
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    for peer, aim in AIMS.items():
        if peer in medians:
            yield f"{peer} / longhaul: {medians[peer] / medians['longhaul']:.1f} (aim: >= {aim})"
    unchecked_s = medians["longhaul without the check"]
    check_s = medians["longhaul"] - unchecked_s
    yield f"comparing the encoders, on the stress corpus, a sample and every chunk: {check_s:.2f} s"
    yield f"fraction of the raw limit without it: {medians['raw'] / unchecked_s:.0%} (aim: >= 90%)"


def megatron_command(folder: Path, corpus: Path) -> dict[str, list[str]]:
    """Return the command of Megatron-LM's script, if MEGATRON names a checkout; like longhaul it adds EOS to each document."""
    if not MEGATRON:
        return {}
    script = Path(MEGATRON) / "tools" / "preprocess_data.py"
    if not script.is_file():
        raise SystemExit(f"MEGATRON={MEGATRON} holds no tools/preprocess_data.py")
    path = os.pathsep.join([MEGATRON, str(PEERS.parents[1] / "megatron")])
    words = ["--input", str(corpus), "--output-prefix", str(folder / "megatron"), "--workers", "2", "--append-eod"]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer")]
    return {"megatron": ["env", f"PYTHONPATH={path}", sys.executable, "-W", "ignore", str(script), *words]}


def megatron_lines(folder: Path, expected: list[np.ndarray], tokenizer: TokenizerManifest) -> Iterator[str]:
    """Report the version of Megatron-LM, and whether its ids equal AutoTokenizer's."""
    if not MEGATRON:
        yield "megatron: left out; MEGATRON=<checkout of NVIDIA/Megatron-LM> make bench-data adds it"
        return
    describe = ["git", "-C", MEGATRON, "describe", "--tags", "--always", "--long", "--abbrev=40"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or "an unknown commit"
    ids = np.fromfile(folder / "megatron_text_document.bin", token_dtype(tokenizer.vocab_size))
    same = np.array_equal(ids, np.concatenate(expected))
    yield f"megatron: tools/preprocess_data.py of {commit}; ids equal to AutoTokenizer's: {same}"


def write_corpus(folder: Path) -> Path:
    """Write Python sources and documentation of this machine as one document per file, in a fixed order."""
    corpus, halves, size = folder / "corpus.jsonl", folder / "halves", 0
    halves.mkdir()
    lines: list[bytes] = []
    for text in texts_of_this_machine():
        lines.append(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
        size += len(lines[-1])
        if size >= CORPUS_BYTES:
            break
    corpus.write_bytes(b"".join(lines))
    middle = int(np.searchsorted(np.cumsum([len(line) for line in lines]), size // 2))
    (halves / "0.jsonl").write_bytes(b"".join(lines[:middle]))
    (halves / "1.jsonl").write_bytes(b"".join(lines[middle:]))
    return corpus


def texts_of_this_machine() -> Iterator[str]:
    """Yield distinct texts of 200 to 600,000 characters, in a fixed random order of their paths."""
    roots = [Path("/usr/share/doc"), Path(os.__file__).parent, Path(sys.prefix) / "lib", PEERS.parent.parent / "lib"]
    kinds = {".py", ".pyi", ".txt", ".rst", ".md", ".html", ".h", ".hpp"}
    paths = sorted({path for root in roots for path in root.rglob("*") if path.suffix in kinds and path.is_file()})
    seen: set[int] = set()
    for index in np.random.default_rng(0).permutation(len(paths)):
        try:
            text = paths[index].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if 200 <= len(text) <= 600_000 and hash(text) not in seen:
            seen.add(hash(text))
            yield text


def write_tokenizer(folder: Path) -> TokenizerManifest:
    """Copy DeepSeek's tokenizer.json from the environment of the other tools, and write its manifest."""
    (found,) = PEERS.parent.parent.glob(
        "lib/*/site-packages/litellm/litellm_core_utils/tokenizers/deepseek_tokenizer.json"
    )
    (folder / "tokenizer").mkdir()
    shutil.copy(found, folder / "tokenizer" / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(found), eos_token=EOS)
    size = max(tokenizer.get_vocab().values()) + 1
    manifest = TokenizerManifest(str(folder / "tokenizer"), "bench", size, None, 1, 1, False, {})
    manifest.write(folder / "tokenizer.artifact.json")
    return manifest


def write_job(folder: Path, corpus: Path) -> Path:
    """Write a job spec like a rule's, with the dataset's default settings."""
    job = TokenizeSpec(
        run="bench",
        name="corpus",
        evaluation=(),
        parts={},
        dataset=Dataset(kind="text", files=(str(corpus),)),
        files=(str(corpus),),
        tokenizer=str(folder / "tokenizer.artifact.json"),
        workers=2,
        source_index=None,
        folder=str(folder / "shards"),
        out=str(folder / "shards.json"),
    )
    job.write(folder / "job.json")
    return folder / "job.json"


def timed(words: list[str], folder: Path) -> float:
    """Return the wall-clock seconds of a command."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "2"}
    return timed_call(
        lambda: subprocess.run(words, check=True, capture_output=True, cwd=folder, env=environment, timeout=TIMEOUT_S)
    )


def timed_call(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def peak_mb(words: list[str], folder: Path) -> float:
    """Run a command once more; return the largest resident set of its processes in MB."""
    shutil.rmtree(folder / "shards")
    script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
    script += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", script, *words], check=True, capture_output=True, text=True)
    return int(done.stdout) / 1024


def compare(manifest: DataManifest, expected: list[np.ndarray]) -> str:
    """Compare the ids of every document of the corpus with the shards."""
    readers = [SplitReader(Path(manifest.path), split, with_mask=False) for split in manifest.splits.values()]
    positions, counts = [0] * len(readers), [reader.token_count for reader in readers]
    documents = same = 0
    for ids in expected:
        documents += 1
        for index, reader in enumerate(readers):
            stop = positions[index] + len(ids)
            if stop <= counts[index] and np.array_equal(reader.tokens(positions[index], stop), ids):
                positions[index], same = stop, same + 1
                break
    return f"{same:,} of {documents:,} documents, {sum(positions):,} of {sum(counts):,} tokens"


def reference_ids(tokenizer: TokenizerManifest, corpus: Path) -> Iterator[np.ndarray]:
    """Yield AutoTokenizer's ids of each document, with EOS."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer.path)
    for line in corpus.open("rb"):
        yield np.array([*encode(json.loads(line)["text"])["input_ids"], tokenizer.eos_id], dtype=np.int32)


if __name__ == "__main__":
    main()
