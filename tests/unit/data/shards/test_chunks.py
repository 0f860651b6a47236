"""Work units: every line once wherever files are cut, the same bytes after kills, one writer, a new file alone."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longhaul.artifacts.files import file_sha256
from longhaul.artifacts.leases import process_start
from longhaul.artifacts.schemas import DataManifest, TokenizerManifest
from longhaul.data.readers.documents import documents_of
from longhaul.data.readers.rows import BadData
from longhaul.data.shards.chunks import Source, Unit, cut
from longhaul.data.shards.progress import Counters
from longhaul.data.shards.write_chunk import RECORD, Task, Worker, of_documents, remove_leftovers
from longhaul.errors import UserError
from tests.support.corpora import conversation, dataset, make_shards, text, tokenize_job, write_jsonl

SMALL = dataset(chunk_mb=0.02)


def source(path: str, size: int, digest: str = "8" * 64) -> Source:
    return Source(path, "jsonl", size, digest, 0)


def read_all(files: Sequence[Path], unit_bytes: int) -> list[object]:
    sources = [Source.of(str(file), "auto") for file in files]
    parts = [piece.part(sources) for unit in cut(sources, unit_bytes, {}) for piece in unit.pieces]
    return [
        found.message if isinstance(found, BadData) else found.content
        for p in parts
        for found in documents_of(p, SMALL)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=30), min_size=1, max_size=30),
    st.integers(1, 200),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_every_line_is_read_once_wherever_a_file_is_cut(texts: list[str], unit_bytes: int, line_break: str):
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "a.jsonl", "text", texts)
        path.write_bytes(path.read_bytes().replace(b"\n", line_break.encode()))
        assert read_all([path], unit_bytes) == texts


@pytest.mark.parametrize("rows_per_group", [1, 3, 50])
def test_every_row_group_is_read_once(tmp_path: Path, rows_per_group: int):
    texts = [text(i) for i in range(50)]
    pyarrow.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=rows_per_group)
    assert read_all([tmp_path / "a.parquet"], 1500) == texts


def test_a_mistake_behind_a_cut_is_named_by_its_line(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", "text", (text(i) for i in range(40)))
    path.write_bytes(path.read_bytes() + b'{"text": 1}\n')
    (message,) = [str(found) for found in read_all([path], 1000) if "not a string" in str(found)]
    assert message.startswith(f"{path}:41: ")


def test_leftovers_of_processes_that_are_gone_are_removed(tmp_path: Path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    mine = f".u-{host}-{os.getpid()}-{process_start(os.getpid())}-b"
    names = {f".u-{host}-{ended.pid}-9.ab-a": False, mine: True, f".u-{host}-{os.getpid()}-9.ab-c": False}
    names[".u-other-host-1-9.ab-d"] = True
    for name in names:
        (tmp_path / name / "unit").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=2, max_size=60), st.data())
def test_a_new_file_leaves_the_units_of_others_alone(sizes: list[int], data: st.DataObject):
    sources = [source(f"{i}.jsonl", size, f"{random.Random(i).getrandbits(256):064x}") for i, size in enumerate(sizes)]
    place = data.draw(st.integers(0, len(sizes)))
    more = [*sources[:place], source("new.jsonl", 10, f"{1:064x}"), *sources[place:]]
    before, after = ({unit.name for unit in cut(files, 1000, {})} for files in (sources, more))
    # A group that had to be closed because it was full may shift those behind it, until one ends by itself.
    assert len(before - after) <= 1 + sum(size < 1000 for size in sizes) // 4
    covered = [(piece.file, piece.start) for unit in cut(more, 1000, {}) for piece in unit.pieces]
    assert covered == sorted(set(covered)) and {file for file, _ in covered} == set(range(len(more)))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12))
def test_documents_are_chosen_whole(documents: list[tuple[int, bool]]):
    lengths = np.array([length for length, _ in documents], np.int32)
    chosen = np.array([is_chosen for _, is_chosen in documents], bool)
    values = np.arange(lengths.sum())
    assert of_documents(values, lengths, chosen).tolist() == values[np.repeat(chosen, lengths)].tolist()


def test_adding_a_large_file_encodes_that_file_alone(tmp_path: Path, tokenizer_folder: Path):
    files = [write_jsonl(tmp_path / f"{n}.jsonl", "text", (text(n * 900 + i) for i in range(200))) for n in (1, 3)]
    first = make_shards(tmp_path, tokenizer_folder, files, SMALL)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.bin")}
    files.insert(1, write_jsonl(tmp_path / "2.jsonl", "text", (text(9000 + i) for i in range(200))))
    second = make_shards(tmp_path, tokenizer_folder, files, SMALL)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    old, new = ({shard["prefix"] for shard in made.splits["train"]["shards"]} for made in (first, second))
    assert old < new and second.sources[1]["documents"] == 200


def hashes(folder: Path) -> dict[str, str]:
    """Of finished units; a half-written one begins with a dot until its process is seen to be gone."""
    return {str(path.relative_to(folder)): file_sha256(path) for path in folder.glob("[!.]*/*")}


def wait_for_work(process: subprocess.Popen[bytes], root: Path, before: set[str]) -> None:
    """Until a unit is begun that was not there before."""
    while process.poll() is None and {path.name for path in root.glob(".*")} <= before:
        time.sleep(0.005)


def test_killed_twenty_times_the_bytes_are_those_of_an_undisturbed_run(tmp_path: Path, tokenizer_folder: Path):
    """Workers and all, at random moments; after each kill some finished units are thrown away, so that work remains."""
    files = [write_jsonl(tmp_path / f"{n}.jsonl", "text", (text(n * 900 + i, 900) for i in range(700))) for n in (1, 2)]
    settings = dataset(chunk_mb=0.1, validation_fraction=0.1)
    whole = make_shards(tmp_path / "whole", tokenizer_folder, files, settings, workers=1)
    (tmp_path / "killed").mkdir()
    job = tokenize_job(tmp_path / "killed", tokenizer_folder, files, settings, workers=2)
    job.write(tmp_path / "job.json")
    chance, root, was_kept, was_cut = random.Random(5), Path(job.folder), 0, 0
    for _ in range(20):
        before = {path.name for path in root.glob(".*")}
        words = [sys.executable, "-m", "longhaul", "tokenize", str(tmp_path / "job.json")]
        process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
        wait_for_work(process, root, before)
        more = len(list(root.glob("*/record.json"))) + chance.randrange(6)
        while process.poll() is None and len(list(root.glob("*/record.json"))) < more:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        was_cut += any(root.glob(".*/unit/*.bin"))
        for finished in root.glob("[!.]*"):
            if chance.random() < 0.5:
                shutil.rmtree(finished)
            else:
                was_kept += 1
        Path(job.out).unlink(missing_ok=True)
    made = make_shards(tmp_path / "killed", tokenizer_folder, files, settings, workers=2)
    assert was_kept and was_cut >= 5, f"kills test little: {was_kept} units kept, {was_cut} kills amid a unit"
    assert hashes(Path(made.path)) == hashes(Path(whole.path))
    assert (made.splits, made.hash, made.sources) == (whole.splits, whole.hash, whole.sources)


def test_workers_end_with_a_killed_job(tmp_path: Path, tokenizer_folder: Path):
    files = [write_jsonl(tmp_path / "a.jsonl", "text", (text(i, 900) for i in range(4000)))]
    job = tokenize_job(tmp_path, tokenizer_folder, files, dataset(chunk_mb=1), workers=2)
    job.write(tmp_path / "job.json")
    process = subprocess.Popen([sys.executable, "-m", "longhaul", "tokenize", str(tmp_path / "job.json")])
    wait_for_work(process, Path(job.folder), set())
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(workers) >= 2 and psutil.wait_procs(workers, timeout=10)[1] == []


def unit_and_worker(folder: Path, tokenizer_folder: Path) -> tuple[Unit, Worker]:
    path = folder / "a.jsonl"
    if not path.exists():
        write_jsonl(path, "text", (text(i) for i in range(50)))
    sources = [Source.of(str(path), "auto")]
    tokenizer = TokenizerManifest.read(tokenizer_folder / "tokenizer.json")
    (folder / "data").mkdir(exist_ok=True)
    task = Task(folder / "data", dataset(), dict(enumerate(sources)), tokenizer, "gigatoken", 2**60)
    return cut(sources, 10**9, {})[0], Worker(task, Counters(get_context("spawn")))


def test_of_two_workers_on_one_unit_one_writes_it(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second begins before the first has finished, and finds the place taken when it is done."""
    unit, first = unit_and_worker(tmp_path, tokenizer_folder)
    _, second = unit_and_worker(tmp_path, tokenizer_folder)
    fill, written = second._fill, []

    def slow_fill(*arguments: Any) -> Any:
        first.make(unit)
        written.append((tmp_path / "data" / unit.name / RECORD).stat())
        return fill(*arguments)

    monkeypatch.setattr(second, "_fill", slow_fill)
    second.make(unit)
    assert (tmp_path / "data" / unit.name / RECORD).stat().st_ino == written[0].st_ino
    assert [path.name for path in (tmp_path / "data").iterdir()] == [unit.name]


def test_what_is_in_a_units_way_is_named(tmp_path: Path, tokenizer_folder: Path):
    unit, worker = unit_and_worker(tmp_path, tokenizer_folder)
    (tmp_path / "data" / unit.name / "notes").mkdir(parents=True)
    with pytest.raises(UserError, match=f"{unit.name} is in the way: it holds no {RECORD}"):
        worker.make(unit)


def test_a_file_that_is_removed_meanwhile_is_named(tmp_path: Path, tokenizer_folder: Path):
    unit, worker = unit_and_worker(tmp_path, tokenizer_folder)
    (source,) = worker._task.sources.values()
    Path(source.path).unlink()
    with pytest.raises(UserError, match=r"a.jsonl does not exist"):
        worker.make(unit)
    with pytest.raises(UserError, match=r"a.jsonl was removed while it was read"):
        source.check_unchanged()


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, tokenizer_folder: Path):
    unit, worker = unit_and_worker(tmp_path, tokenizer_folder)
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"a.jsonl changed while it was read \(\d+ bytes before, \d+ now\)"):
        worker.make(unit)
    assert list((tmp_path / "data").iterdir()) == []


BAD_LINES = (
    b'{"text": "one"}\nnonsense\n{"text": null}\n{"body": 1}\n{"text": "\xff"}\n{"text": "'
    + b"x" * 2000
    + b'"}\n{"text": "two"}'
)


def test_bad_rows_are_left_out_counted_and_named_where_the_dataset_says_so(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.jsonl").write_bytes(BAD_LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(BAD_LINES * 50)[:-30])
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "d.jsonl").write_bytes(b"\n\n")
    lenient = dataset(bad_rows="skip", max_document_mb=0.001)
    made = make_shards(tmp_path, tokenizer_folder, sorted(tmp_path.glob("?.jsonl*")), lenient)
    (of_gzip,) = [source["documents"] for source in made.sources if source["path"].endswith("gz")]
    assert made.splits["train"]["documents"] + made.splits["validation"]["documents"] == 2 + of_gzip
    assert made.skipped["damaged file"] == made.skipped["empty file"] == made.skipped["no documents"] == 1
    assert set(made.skipped) == {
        "not valid JSON",
        "null text",
        "missing column",
        "invalid UTF-8",
        "too long",
        "damaged file",
        "empty file",
        "no documents",
    }
    named = capsys.readouterr().err
    assert re.search(r"b.jsonl.gz after line \d+: .*; nothing that follows in the file is read", named)
    assert "a.jsonl:2: not valid JSON" in named and "a.jsonl:6: longer than 0.001 MB" in named


def test_the_default_is_to_stop_at_a_line_that_is_too_long(tmp_path: Path, tokenizer_folder: Path):
    write_jsonl(tmp_path / "a.jsonl", "text", ["short", "x" * 5000, "short"])
    with pytest.raises(UserError, match=r"a.jsonl:2: longer than 0.001 MB, the dataset's max_document_mb"):
        make_shards(tmp_path, tokenizer_folder, [tmp_path / "a.jsonl"], dataset(max_document_mb=0.001))


# Makes a job in a process of its own; prints the exit code that a job would end with, and the peak memory in MB. Not
# ru_maxrss, which begins with what the parent held when it started the process.
MEASURED = (
    "import re, sys; from pathlib import Path; from longhaul.cli import main\n"
    "try: main(['tokenize', sys.argv[1]]); code = 0\n"
    "except SystemExit as ended: code = ended.code\n"
    "peak_kb = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]\n"
    "print(code, int(peak_kb) // 1024)"
)


def measured(folder: Path, tokenizer_folder: Path, path: Path, settings: Any) -> tuple[int, int, str]:
    """Exit code, peak MB and stderr of a job over one file, in one process."""
    folder.mkdir()
    job = tokenize_job(folder, tokenizer_folder, [path], settings)
    job.write(folder / "job.json")
    words = [sys.executable, "-c", MEASURED, str(folder / "job.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    code, peak_mb = map(int, done.stdout.split())
    return code, peak_mb, done.stderr


def test_a_line_of_a_gigabyte_is_never_held_whole(tmp_path: Path, tokenizer_folder: Path):
    """A file with a hole, which takes no room; it spans dozens of units."""
    path = write_jsonl(tmp_path / "a.jsonl", "text", ["before"])
    with path.open("r+b") as stream:
        stream.seek(0, os.SEEK_END)
        stream.write(b'{"text": "')
        stream.seek(10**9, os.SEEK_CUR)
        stream.write(b'"}\n{"text": "after"}\n')
    code, peak_mb, log = measured(tmp_path / "skip", tokenizer_folder, path, dataset(bad_rows="skip"))
    made = DataManifest.read(tmp_path / "skip" / "data.json")
    assert code == 0 and peak_mb < 1024 // 2, log
    assert sum(split["documents"] for split in made.splits.values()) == 2 and made.skipped == {"too long": 1}
    assert f"left out (too long): {path}:2: longer than 64 MB" in log
    code, peak_mb, log = measured(tmp_path / "stop", tokenizer_folder, path, dataset())
    assert code == 2 and peak_mb < 1024 // 2
    assert f"error: {path}:2: longer than 64 MB, the dataset's max_document_mb" in log


def with_a_normalizer(folder: Path, tokenizer_folder: Path) -> Path:
    """A tokenizer that gigatoken cannot read."""
    manifest = TokenizerManifest.read(tokenizer_folder / "tokenizer.json")
    own = Path(shutil.copytree(manifest.path, folder / "own"))
    written = json.loads((own / "tokenizer.json").read_text())
    (own / "tokenizer.json").write_text(json.dumps({**written, "normalizer": {"type": "Lowercase"}}))
    dataclasses.replace(manifest, path=str(own), hash="own").write(folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize(("encoder", "kind", "most_mb"), [("gigatoken", "chat", 24), ("tokenizers", "chat", 4)])
def test_the_longest_document_fits_and_a_longer_one_is_refused(
    tmp_path: Path, tokenizer_folder: Path, encoder: str, kind: str, most_mb: int
):
    own = tokenizer_folder if encoder == "gigatoken" else with_a_normalizer(tmp_path, tokenizer_folder)
    words = text(1, 400)
    for name, times in (("fits", 0.98), ("refused", 1.02)):
        answer = words * int(times * most_mb * 1e6 / len(words.encode()))
        path = write_jsonl(
            tmp_path / f"{name}.jsonl", "messages", [[*conversation(1)[:2], {"role": "assistant", "content": answer}]]
        )
        with path.open("a") as stream:
            stream.write(json.dumps({"messages": conversation(2)}) + "\n")
        code, peak_mb, log = measured(tmp_path / name, own, path, dataset(kind))
        assert peak_mb < 1024, log
        assert code == (0 if name == "fits" else 2), log
    assert f"more than the {most_mb} MB that {encoder} encodes within 1 GiB of memory" in log


def test_a_large_row_group_is_never_held_whole(tmp_path: Path, tokenizer_folder: Path):
    """One row group of 600 MB of text: its rows are the same thirty again and again."""
    rows = pa.array([f"{number} " + "long haul " * 200_000 for number in range(30)], pa.large_string())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": pa.chunked_array([rows] * 10)}), path, use_dictionary=False)
    group = pyarrow.parquet.read_metadata(path).row_group(0)
    assert (group.num_rows, group.total_byte_size > 5 * 10**8) == (300, True)
    code, peak_mb, log = measured(tmp_path / "made", tokenizer_folder, path, dataset(validation_fraction=0))
    assert code == 0 and peak_mb < 600, log
    assert sum(s["documents"] for s in DataManifest.read(tmp_path / "made" / "data.json").splits.values()) == 300
