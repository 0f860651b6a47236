"""Long lines, long documents and large row groups never exceed the memory limit of a worker."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from longhaul.artifacts.artifact_schemas import DataManifest, TokenizerManifest
from longhaul.artifacts.atomic_files import file_sha256
from tests.support.corpora import conversation, dataset, text, tokenize_job, write_jsonl

# Runs a job in a process of its own; prints the job's exit code and the peak memory in MB. ru_maxrss is no alternative: it
# starts with the memory that the parent had when it started this process.
RUN_AND_MEASURE = (
    "import re, sys; from pathlib import Path; from longhaul.cli import main\n"
    "try: main(['job', 'run', 'tokenize', sys.argv[1]]); code = 0\n"
    "except SystemExit as ended: code = ended.code\n"
    "peak_kb = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]\n"
    "print(code, int(peak_kb) // 1024)"
)


def run_and_measure(folder: Path, tokenizer_folder: Path, path: Path, settings: Any) -> tuple[int, int, str]:
    """Run a job on one file, in one process; return its exit code, peak memory in MB and stderr."""
    folder.mkdir()
    job = tokenize_job(folder, tokenizer_folder, [path], settings)
    job.write(folder / "job.json")
    words = [sys.executable, "-c", RUN_AND_MEASURE, str(folder / "job.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    code, peak_mb = map(int, done.stdout.split())
    return code, peak_mb, done.stderr


def test_a_line_of_a_gigabyte_is_skipped_in_little_memory(tmp_path: Path, tokenizer_folder: Path):
    """The line is a hole in a sparse file, which takes no disk space. It spans dozens of chunks."""
    path = write_jsonl(tmp_path / "a.jsonl", "text", ["before"])
    with path.open("r+b") as stream:
        stream.seek(0, os.SEEK_END)
        stream.write(b'{"text": "')
        stream.seek(10**9, os.SEEK_CUR)
        stream.write(b'"}\n{"text": "after"}\n')
    code, peak_mb, log = run_and_measure(tmp_path / "skip", tokenizer_folder, path, dataset(bad_rows="skip"))
    manifest = DataManifest.read(tmp_path / "skip" / "data.json")
    assert code == 0 and peak_mb < 1024 // 2, log
    assert sum(split["documents"] for split in manifest.splits.values()) == 2 and manifest.skipped == {"too long": 1}
    assert f"left out (too long): {path}:2: longer than 64 MB" in log
    code, peak_mb, log = run_and_measure(tmp_path / "stop", tokenizer_folder, path, dataset())
    assert code == 2 and peak_mb < 1024 // 2
    assert f"error: {path}:2: longer than 64 MB, the dataset's max_document_mb" in log


def unsupported_tokenizer(folder: Path, tokenizer_folder: Path) -> Path:
    """Return a folder with a tokenizer that gigatoken does not support, because it has a normalizer."""
    manifest = TokenizerManifest.read(tokenizer_folder / "tokenizer.json")
    own = Path(shutil.copytree(manifest.path, folder / "own"))
    written = json.loads((own / "tokenizer.json").read_text())
    (own / "tokenizer.json").write_text(json.dumps({**written, "normalizer": {"type": "Lowercase"}}))
    files = {**manifest.files, "tokenizer.json": file_sha256(own / "tokenizer.json")}
    dataclasses.replace(manifest, path=str(own), hash="own", files=files).write(folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize(
    ("encoder", "kind", "max_mb"),
    [("tokenizers", "chat", 4), pytest.param("gigatoken", "chat", 24, marks=pytest.mark.slow)],
)
def test_the_longest_document_fits_and_a_longer_one_is_refused(
    tmp_path: Path, tokenizer_folder: Path, encoder: str, kind: str, max_mb: int
):
    own = tokenizer_folder if encoder == "gigatoken" else unsupported_tokenizer(tmp_path, tokenizer_folder)
    words = text(1, 400)
    for name, times in (("fits", 0.98), ("refused", 1.02)):
        answer = words * int(times * max_mb * 1e6 / len(words.encode()))
        path = write_jsonl(
            tmp_path / f"{name}.jsonl", "messages", [[*conversation(1)[:2], {"role": "assistant", "content": answer}]]
        )
        with path.open("a") as stream:
            stream.write(json.dumps({"messages": conversation(2)}) + "\n")
        code, peak_mb, log = run_and_measure(tmp_path / name, own, path, dataset(kind))
        assert peak_mb < 1024, log
        assert code == (0 if name == "fits" else 2), log
    assert f"more than the {max_mb} MB that {encoder} encodes within 1 GiB of memory" in log


def test_a_large_row_group_is_read_in_little_memory(tmp_path: Path, tokenizer_folder: Path):
    """One row group with 600 MB of text, in which thirty rows repeat."""
    rows = pa.array([f"{number} " + "long haul " * 200_000 for number in range(30)], pa.large_string())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": pa.chunked_array([rows] * 10)}), path, use_dictionary=False)
    group = pyarrow.parquet.read_metadata(path).row_group(0)
    assert (group.num_rows, group.total_byte_size > 5 * 10**8) == (300, True)
    code, peak_mb, log = run_and_measure(tmp_path / "job", tokenizer_folder, path, dataset(validation_fraction=0))
    assert code == 0 and peak_mb < 600, log
    assert sum(s["documents"] for s in DataManifest.read(tmp_path / "job" / "data.json").splits.values()) == 300
