"""Raw text to shards on two cores: ours beside `datasets` map, datatrove, Megatron's preprocess and the raw limit.

Wall time with start-up, rounds alternated, medians. Megatron's tools/preprocess_data.py is in no package that pip installs:
MEGATRON=<checkout of NVIDIA/Megatron-LM> adds it.
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

from bench.machine import header, publish
from longhaul.artifacts.schemas import DataManifest, TokenizerManifest
from longhaul.config.dataset_config import Dataset
from longhaul.data.shards.indexed_dataset import SplitReader, token_dtype
from longhaul.jobs.specs import TokenizeSpec

ROUNDS = 3
SHORT_RUNS_A_ROUND = 5  # of what takes seconds, where noise weighs more than in what takes minutes
CORPUS_BYTES = 400_000_000
MEGATRON = os.environ.get("MEGATRON", "")
PEERS = Path(sys.prefix).parent / ".venv-bench" / "bin" / "python"
AIMS = {"datasets": 20, "datatrove": 12, "megatron": 35}
LONGEST_S = 3600  # Megatron's main process waits for ever when its child fails
# The same without the reference, and without any comparison with it; workers are forked, and inherit it.
UNCHECKED = (
    "import sys; from longhaul import cli; from longhaul.data import corpus, encoding, tokenize; "
    "corpus.choose = lambda *_: corpus.Choice('gigatoken', ''); encoding.Encoder.check = lambda *_: None; "
    "tokenize.hard_ids = lambda *_: (); tokenize.load_reference = lambda _: None; "
    "sys.argv[1:] = ['tokenize', sys.argv[1]]; import longhaul.__main__"
)
EOS = "<｜end▁of▁sentence｜>"


def main() -> None:
    """Prints medians and ratios, and checks every id of the corpus against AutoTokenizer's."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        folder = Path(name)
        corpus = make_corpus(folder)
        tokenizer = make_tokenizer(folder)
        job = str(make_job(folder, corpus))

        def peer(kind: str) -> list[str]:
            return [str(PEERS), str(Path(__file__).with_name("data_peers.py")), kind, name]

        ours = [sys.executable, "-m", "longhaul", "tokenize", job]
        short = {
            "longhaul without the check": [sys.executable, "-c", UNCHECKED, job],
            "raw": peer("raw"),
            "longhaul": ours,
        }
        long = {"datasets": peer("datasets"), "datatrove": peer("datatrove"), **megatron(folder, corpus)}
        seconds: dict[str, list[float]] = {kind: [] for kind in (*short, *long)}
        for _ in range(ROUNDS):
            for kind, words in [*short.items()] * SHORT_RUNS_A_ROUND + [*long.items()]:
                if kind.startswith("longhaul"):
                    shutil.rmtree(folder / "shards", ignore_errors=True)
                seconds[kind].append(timed(words, folder))
        manifest = DataManifest.read(folder / "shards.json")
        expected = list(reference_ids(tokenizer, corpus))
        lines = [
            *header(("gigatoken", "tokenizers", "orjson", "numpy")),
            f"corpus: {corpus.stat().st_size / 1e6:.0f} MB of jsonl, {manifest.sources[0]['documents']:,} documents, "
            f"{sum(split['tokens'] for split in manifest.splits.values()):,} tokens, DeepSeek's byte-level BPE",
            f"wall s, start-up included, 2 cores, median of {ROUNDS} alternated rounds, the short ones "
            f"{SHORT_RUNS_A_ROUND} times in each:",
            *(
                f"  {kind}: {statistics.median(found):.2f} ({', '.join(f'{s:.2f}' for s in found)})"
                for kind, found in seconds.items()
            ),
            *ratios(seconds),
            f"encoder: {manifest.encoder['name']}",
            f"peak resident memory of the largest of our processes: {peak_mb(ours, folder):.0f} MB",
            f"ids equal to AutoTokenizer's: {compare(manifest, expected)}",
            *about_megatron(folder, expected, tokenizer),
        ]
    publish("data", lines)


def ratios(seconds: dict[str, list[float]]) -> Iterator[str]:
    """Medians against ours."""
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    for peer, aim in AIMS.items():
        if peer in medians:
            yield f"{peer} / longhaul: {medians[peer] / medians['longhaul']:.1f} (aim: >= {aim})"
    unchecked_s = medians["longhaul without the check"]
    yield f"the check, on hard texts, a sample and in every unit: {medians['longhaul'] - unchecked_s:.2f} s"
    yield f"share of the raw limit without it: {medians['raw'] / unchecked_s:.0%} (aim: >= 90%)"


def megatron(folder: Path, corpus: Path) -> dict[str, list[str]]:
    """Megatron's script by its own command line, where MEGATRON names a checkout; ids as ours are, EOS behind each document."""
    if not MEGATRON:
        return {}
    script = Path(MEGATRON) / "tools" / "preprocess_data.py"
    if not script.is_file():
        raise SystemExit(f"MEGATRON={MEGATRON} holds no tools/preprocess_data.py")
    path = os.pathsep.join([MEGATRON, str(PEERS.parents[1] / "megatron")])
    words = ["--input", str(corpus), "--output-prefix", str(folder / "megatron"), "--workers", "2", "--append-eod"]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer")]
    return {"megatron": ["env", f"PYTHONPATH={path}", sys.executable, "-W", "ignore", str(script), *words]}


def about_megatron(folder: Path, expected: list[np.ndarray], tokenizer: TokenizerManifest) -> Iterator[str]:
    """Which Megatron it was, and whether its ids are AutoTokenizer's, too."""
    if not MEGATRON:
        yield "megatron: left out; MEGATRON=<checkout of NVIDIA/Megatron-LM> make bench-data adds it"
        return
    asked = ["git", "-C", MEGATRON, "describe", "--tags", "--always", "--long", "--abbrev=40"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "an unknown commit"
    ids = np.fromfile(folder / "megatron_text_document.bin", token_dtype(tokenizer.vocab_size))
    same = np.array_equal(ids, np.concatenate(expected))
    yield f"megatron: tools/preprocess_data.py of {commit}; its ids are AutoTokenizer's: {same}"


def make_corpus(folder: Path) -> Path:
    """Python sources and documentation that lie on this machine, one document a file, in a fixed order."""
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
    """Distinct texts of 200 to 600,000 characters, in a fixed shuffle of their paths."""
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


def make_tokenizer(folder: Path) -> TokenizerManifest:
    """DeepSeek's tokenizer.json out of the peers' environment."""
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
    manifest = TokenizerManifest(str(folder / "tokenizer"), "bench", size, None, 1, 1, False)
    manifest.write(folder / "tokenizer.artifact.json")
    return manifest


def make_job(folder: Path, corpus: Path) -> Path:
    """A job as a rule would run it, with the dataset's defaults."""
    job = TokenizeSpec(
        run="bench",
        name="corpus",
        evaluation=(),
        parts={},
        dataset=Dataset(kind="text", files=(str(corpus),)),
        files=(str(corpus),),
        tokenizer=str(folder / "tokenizer.artifact.json"),
        workers=2,
        survey=None,
        folder=str(folder / "shards"),
        out=str(folder / "shards.json"),
    )
    job.write(folder / "job.json")
    return folder / "job.json"


def timed(words: list[str], folder: Path) -> float:
    """Wall seconds of a command."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "2"}
    return timed_call(
        lambda: subprocess.run(words, check=True, capture_output=True, cwd=folder, env=environment, timeout=LONGEST_S)
    )


def timed_call(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def peak_mb(words: list[str], folder: Path) -> float:
    """Largest resident set among a command's processes, in a run of its own."""
    shutil.rmtree(folder / "shards")
    script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
    script += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", script, *words], check=True, capture_output=True, text=True)
    return int(done.stdout) / 1024


def compare(manifest: DataManifest, expected: list[np.ndarray]) -> str:
    """Every document of the corpus, looked up by its ids in the shards."""
    readers = [SplitReader(Path(manifest.path), split, with_mask=False) for split in manifest.splits.values()]
    places, counts = [0] * len(readers), [reader.token_count for reader in readers]
    documents = same = 0
    for ids in expected:
        documents += 1
        for index, reader in enumerate(readers):
            stop = places[index] + len(ids)
            if stop <= counts[index] and np.array_equal(reader.tokens(places[index], stop), ids):
                places[index], same = stop, same + 1
                break
    return f"{same:,} of {documents:,} documents, {sum(places):,} of {sum(counts):,} tokens"


def reference_ids(tokenizer: TokenizerManifest, corpus: Path) -> Iterator[np.ndarray]:
    """AutoTokenizer's ids of each document, and EOS."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer.path)
    for line in corpus.open("rb"):
        yield np.array([*encode(json.loads(line)["text"])["input_ids"], tokenizer.eos_id], dtype=np.int32)


if __name__ == "__main__":
    main()
