"""Jobs report errors in data, tokenizers and job specs, and leave no incomplete file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from longhaul.cli import main
from longhaul.data.tokenizers.build_tokenizer import DEFAULT_CHAT_TEMPLATE, EOS
from longhaul.jobs.job_spec import JobSpec
from tests.support.check_user_errors import files_below, refused_message
from tests.support.corpora import conversation, dataset, make_tokenizer, text, tokenize_job, tokenizer_job, write_jsonl


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tokenizer.json, the manifest of a tokenizer of 400 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, [write_jsonl(folder / "corpus.jsonl", "text", (text(i) for i in range(200)))])
    return folder


def run_job(folder: Path, job: JobSpec) -> None:
    """Run a tokenizer job, which must succeed."""
    with pytest.raises(SystemExit) as exited:
        main(["job", "run", "tokenizer", write_job(folder, job)])
    assert not exited.value.code and (folder / "tokenizer.json").is_file()


def write_job(folder: Path, job: JobSpec) -> str:
    job.write(folder / "job.json")
    return str(folder / "job.json")


def arrow_file(text: bytes) -> bytes:
    """Return an Arrow file with one row, whose text has these bytes."""
    offsets = pa.array([0, len(text)], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(text)])
    sink = pa.BufferOutputStream()
    table = pa.table({"text": column})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


GOOD = b'{"text": "one"}\n{"text": "two"}\n'
DATA: dict[str, tuple[str, bytes, str]] = {
    "invalid JSON": ("a.jsonl", GOOD + b'{"text": "thr\n', "a.jsonl:3: not valid JSON"),
    "missing column": ("a.jsonl", GOOD + b'{"body": "x"}\n', "a.jsonl:3: no column 'text'; found 'body'"),
    "null": ("a.jsonl", GOOD + b'{"text": null}\n', "a.jsonl:3: text is null"),
    "a number": ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: text is int '5', not a string"),
    "invalid UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "a.jsonl:3: byte 0xff is not valid UTF-8"),
    "unpaired surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: text holds an unpaired surrogate"),
    "no documents": ("a.jsonl", b"\n\n", "a.jsonl holds no documents"),
    "empty": ("a.jsonl", b"", "a.jsonl is empty"),
    "truncated": ("a.jsonl.gz", b"\x1f\x8b\x08\x00abc", "cannot read"),
    "not Parquet": ("a.parquet", b"PAR1 and nothing more", "cannot read"),
    "CSV with another header": ("a.csv", b"body,n\nx,1\n", "a.csv:1: no column 'text'; found 'body', 'n'"),
    "CSV with an unquoted comma": ("a.csv", b"text,n\na, b,1\n", "a.csv:2: 3 fields, but the header has 2"),
    "not an object": ("a.jsonl", b'["one"]\n', "a.jsonl:1: expected a JSON object, found list"),
    "two equal columns": ("a.csv", b"text,text\na,b\n", "2 columns are named 'text'"),
    "damaged JSON list": ("a.json", b'[{"text": "one"},', "a.json:1: not valid JSON"),
    "Arrow with invalid UTF-8": ("a.arrow", arrow_file(b"\xff"), "not valid UTF-8"),
    "unknown suffix": ("a.bin", b"abc", "unknown file suffix"),
}


@pytest.mark.parametrize(("name", "content", "expected"), DATA.values(), ids=DATA)
def test_an_error_in_data_is_reported(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tokenizer_folder: Path,
    name: str,
    content: bytes,
    expected: str,
):
    (tmp_path / name).write_bytes(content)
    job = tokenize_job(tmp_path, tokenizer_folder, [tmp_path / name], dataset())
    assert expected in refused_message(capsys, "job", "run", "tokenize", write_job(tmp_path, job))
    assert files_below(tmp_path) - {name, "job.json", "data"} == set(), "a file is incomplete"


CHATS: dict[str, tuple[Any, str]] = {
    "text instead of messages": ("hello", "a.jsonl:1: a conversation is a list of messages, found str"),
    "no messages": ([], "found an empty list"),
    "unknown role": ([{"role": "robot", "content": "x"}], "message 1: role 'robot' is not one of system"),
    "no content": ([{"role": "user"}], "message 1: no 'content'; found 'role'"),
    "content that is no text": ([{"role": "user", "content": 1}], "message 1: content is int '1'"),
}


@pytest.mark.parametrize(("messages", "expected"), CHATS.values(), ids=CHATS)
def test_an_error_in_a_conversation_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer_folder: Path, messages: Any, expected: str
):
    write_jsonl(tmp_path / "a.jsonl", "messages", [messages, conversation(1)])
    job = tokenize_job(tmp_path, tokenizer_folder, [tmp_path / "a.jsonl"], dataset("chat"))
    assert expected in refused_message(capsys, "job", "run", "tokenize", write_job(tmp_path, job))


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer_folder: Path
):
    manifest = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    job = tokenizer_job(tmp_path, path=manifest["path"], train_vocab_size=None, model_vocab_size=300)
    message = refused_message(capsys, "job", "run", "tokenizer", write_job(tmp_path, job))
    assert f"the tokenizer has {manifest['vocab_size']} tokens; the model's vocab_size is 300" in message
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_tokenizer_without_eos_or_template_is_refused_until_it_is_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer_folder: Path
):
    source = Path(json.loads((tokenizer_folder / "tokenizer.json").read_text())["path"])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    job = tokenizer_job(tmp_path, path=str(tmp_path / "bare"), train_vocab_size=None, needs_chat_template=False)
    assert "bare has no EOS token" in refused_message(capsys, "job", "run", "tokenizer", write_job(tmp_path, job))
    assert not (tmp_path / "tokenizer.json").exists()
    settings = {"eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(settings))
    chats = job.model_copy(update={"needs_chat_template": True})
    message = refused_message(capsys, "job", "run", "tokenizer", write_job(tmp_path, chats))
    assert "bare has no chat template" in message and "set tokenizer.chat_template" in message
    run_job(tmp_path, chats.model_copy(update={"chat_template": str(DEFAULT_CHAT_TEMPLATE)}))
    run_job(tmp_path, job)


def test_an_unusable_tokenizer_or_template_is_refused_until_another_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer_folder: Path
):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    path = json.loads((tokenizer_folder / "tokenizer.json").read_text())["path"]
    good = tokenizer_job(tmp_path, path=path, train_vocab_size=None)
    for changes, message in (
        ({"path": str(tmp_path / "none")}, "none holds no tokenizer.json"),
        ({"path": str(tmp_path / "broken")}, "cannot load "),
        ({"chat_template": str(tmp_path / "none.jinja")}, "tokenizer.chat_template: cannot read"),
    ):
        job = good.model_copy(update=changes)
        assert message in refused_message(capsys, "job", "run", "tokenizer", write_job(tmp_path, job))
    run_job(tmp_path, good.model_copy(update={"chat_template": str(DEFAULT_CHAT_TEMPLATE)}))


@pytest.mark.parametrize("operation", ["ns.a == ns.b", "{ns.a: 1}"])
def test_a_chat_template_with_an_endless_operation_is_refused_until_another_is_given(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tokenizer_folder: Path,
    operation: str,
):
    monkeypatch.setattr("longhaul.data.tokenizers.chat_template.RENDER_LIMIT_S", 1)
    nested = "{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}{% set ns.b = (ns.b, ns.b) %}{% endfor %}"
    template = tmp_path / "endless.jinja"
    template.write_text(f"{{% set ns = namespace(a=(1,), b=(1,)) %}}{nested}{{{{ {operation} }}}}")
    path = json.loads((tokenizer_folder / "tokenizer.json").read_text())["path"]
    job = tokenizer_job(tmp_path, path=path, train_vocab_size=None, chat_template=str(template))
    message = refused_message(capsys, "job", "run", "tokenizer", write_job(tmp_path, job))
    assert "one operation of the chat template, such as the comparison of nested lists, has no end" in message
    assert not (tmp_path / "tokenizer.json").exists()
    run_job(tmp_path, job.model_copy(update={"chat_template": str(DEFAULT_CHAT_TEMPLATE)}))


def test_a_tokenizer_with_ids_too_large_for_shards_is_refused_until_they_are_smaller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer_folder: Path
):
    shutil.copytree(json.loads((tokenizer_folder / "tokenizer.json").read_text())["path"], tmp_path / "large")
    path = tmp_path / "large" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["huge id"] = 2**31
    path.write_text(json.dumps(content))
    job = tokenizer_job(tmp_path, path=str(tmp_path / "large"), train_vocab_size=None, model_vocab_size=None)
    message = refused_message(capsys, "job", "run", "tokenizer", write_job(tmp_path, job))
    assert "ids reach 2147483648; shards hold ids up to 2147483647" in message
    content["model"]["vocab"]["huge id"] = len(content["model"]["vocab"]) + 10
    path.write_text(json.dumps(content))
    run_job(tmp_path, job)


def test_a_job_spec_of_another_release_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "job.json").write_text('{"run": "a"}')
    assert "is not a complete TokenizeSpec" in refused_message(
        capsys, "job", "run", "tokenize", str(tmp_path / "job.json")
    )
    assert "does not exist" in refused_message(capsys, "job", "run", "train", str(tmp_path / "no.json"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_reported(tmp_path: Path, tokenizer_folder: Path):
    """The job writes to a file system of 200 KiB, which only this test's mount namespace contains."""
    write_jsonl(tmp_path / "a.jsonl", "text", (text(i, 300) for i in range(400)))
    (tmp_path / "small").mkdir()
    job = tokenize_job(tmp_path / "small", tokenizer_folder, [tmp_path / "a.jsonl"], dataset())
    words = [sys.executable, "-m", "longhaul", "job", "run", "tokenize", write_job(tmp_path, job)]
    script = 'mount -t tmpfs -o size=200k none small && "$@"; code=$?; find small -name "*.bin" -o -name "*.json"; exit $code'
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, "bash", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "writing dataset corpus needs more free space in" in done.stderr, done.stderr
    assert "storage.data" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.split() == [], "incomplete shards are left"
