"""Downloads from a hub are pinned to a commit, contain only the needed files, happen once, and have clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet
import pytest

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.artifacts.atomic_files import file_sha256
from longhaul.artifacts.task_data_lock import PinnedDataset, TaskDataLock
from longhaul.evaluation.offline_datasets import OfflineDatasets
from tests.support.fake_hub import COMMIT, Hub
from tests.support.pipeline_run import SECRETS, leaks
from tests.support.run_module_in_forks import ForkedModule
from tests.support.small_configs import LLAMA, STAGE, write_config, write_weights

BASE = {"model_type": "llama", **LLAMA, "vocab_size": 400}
FILES = {
    "models/org/base/config.json": json.dumps(BASE),
    "models/org/base/pytorch_model.bin": "a pickle",
    "models/org/base/modeling_own.py": "raise SystemExit('this code must not run')",
    "models/org/pickle/config.json": json.dumps({"model_type": "llama", **LLAMA}),
    "models/org/pickle/pytorch_model.bin": "a pickle",
    "models/org/base/tokenizer.json": "{}",
    "models/org/base/tokenizer_config.json": "{}",
    "datasets/org/text/en/train-00000-of-00002.jsonl": '{"text": "a"}\n',
    "datasets/org/text/en/train-00001-of-00002.jsonl": '{"text": "b"}\n',
    "datasets/org/text/en/test-00000-of-00001.jsonl": '{"text": "c"}\n',
    "datasets/org/text/de/train-00000-of-00001.jsonl": '{"text": "d"}\n',
    "datasets/org/text/README.md": """\
---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train-*}
  - {split: test, path: en/test-*}
- config_name: de
  data_files: [{split: train, path: de/*}]
---
train
""",
    # The configurations have other names than their folders, and one split's name starts with another's.
    "datasets/org/named/en/train.jsonl": '{"text": "the decoy, in a folder of the name"}\n',
    "datasets/org/named/part-0/a.jsonl": '{"text": "e"}\n',
    "datasets/org/named/part-0/b.jsonl": '{"text": "f"}\n',
    "datasets/org/named/part-0/train.txt": "not listed",
    "datasets/org/named/part-1/train_extra.jsonl": '{"text": "g"}\n',
    "datasets/org/named/part-2/train.jsonl": '{"text": "h"}\n',
    "datasets/org/named/README.md": """\
---
configs:
- config_name: en
  data_files:
  - {split: train, path: [part-0/b.jsonl, part-0/a.jsonl]}
  - {split: train_extra, path: part-1/*}
- config_name: german
  default: true
  data_files: part-2/*.jsonl
---
""",
    # No dataset card: `datasets` finds files by its own patterns.
    "datasets/org/bare/data/train-00000-of-00001.jsonl": '{"text": "i"}\n',
    "datasets/org/bare/data/train_extra-00000-of-00001.jsonl": '{"text": "j"}\n',
    "datasets/org/bare/data/test-00000-of-00001.jsonl": '{"text": "k"}\n',
    "datasets/org/folders/training/x.jsonl": '{"text": "l"}\n',
    "datasets/org/folders/dev/y.jsonl": '{"text": "m"}\n',
    "datasets/org/unsplit/anything.csv": "text\nn\n",
    "datasets/org/pictures/train/cat.png": "not text",
    "datasets/org/broken/data/test-00000-of-00001.jsonl": '{"question": "1+1',
    "datasets/org/quiz/data/test-00000-of-00001.jsonl": '{"question": "1+1", "answer": "2"}\n',
    "datasets/org/scripted/scripted.py": "raise SystemExit('this code must not run')",
}
CONFIG = {
    "tokenizer": {"hub": {"id": "org/base", "revision": "v1"}},
    "datasets": {"prose": {"kind": "text", "hub": {"id": "org/text", "name": "en"}}},
    "model": {"pretrained": {"hub": {"id": "org/base"}}},
    "stages": [STAGE],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def hub(server: Hub, tmp_path: Path) -> Hub:
    """The hub with FILES and the weights of BASE, which a test may change."""
    for name, text in FILES.items():
        path = tmp_path / "served" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    write_weights(tmp_path / "served/models/org/base/model.safetensors", BASE)
    server.serve_only(tmp_path / "served")
    return server


def environment(url: str, home: Path) -> dict[str, str]:
    # jobs of other tests in this process make the hub's libraries offline
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    return {**inherited, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a link to the cache of the current test."""
    return tmp_path_factory.mktemp("cache") / "home"


@pytest.fixture(scope="module")
def cli(server: Hub, home: Path) -> Iterator[ForkedModule]:
    """huggingface_hub reads the addresses of the hub and of its cache when it is imported."""
    cli = ForkedModule("longhaul", IMPORTED, environment(server.url, home))
    yield cli
    cli.close()


IMPORTED = ("longhaul.cli", "datasets", "huggingface_hub", "longhaul.fetch.hub_downloads")
Fetch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def fetch(cli: ForkedModule, hub: Hub, home: Path) -> Fetch:
    """A function that runs `longhaul fetch` in a folder, with a cache in that folder, with changes of CONFIG."""

    def run(folder: Path, changes: dict[str, Any] | None = None, *options: str) -> subprocess.CompletedProcess[str]:
        config = write_config(folder, {**CONFIG, **(changes or {})})
        home.unlink(missing_ok=True)
        (folder / "cache").mkdir(exist_ok=True)
        home.symlink_to(folder / "cache")
        return cli.run("fetch", str(config), *options, cwd=folder, environment=environment(hub.url, home))

    return run


def test_sources_are_pinned_and_only_needed_files_are_downloaded(tmp_path: Path, hub: Hub, fetch: Fetch):
    done = fetch(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "checked now: model org/base" in done.stdout
    lock = Lock.read(tmp_path / "results" / "small.lock.json")
    assert {source["revision"] for source in lock.sources.values()} == {COMMIT}
    assert [Path(file).name for file in lock.sources["prose"]["files"]] == [
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
    ]
    assert [Path(file).read_text() for file in lock.sources["prose"]["files"]] == ['{"text": "a"}\n', '{"text": "b"}\n']
    assert lock.model["hidden_size"] == LLAMA["hidden_size"]
    downloaded = set(hub.served)
    assert "org/base/model.safetensors" in downloaded
    assert not [name for name in downloaded if name.endswith((".bin", ".py")) or "test-" in name or "/de/" in name]


def test_the_token_is_sent_to_the_hub_and_stored_nowhere(
    tmp_path: Path, hub: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for changes in (None, ERRORS["a missing model"][0], ERRORS["a missing split"][0]):
        done = fetch(tmp_path / str(len(hub.tokens)), changes)
        assert not any(secret in done.stdout + done.stderr for secret in SECRETS.values())
    assert {token for path, token in hub.tokens if "/org/" in path} == {f"Bearer {SECRETS['HF_TOKEN']}"}
    (tmp_path / "served").rename(tmp_path.with_name(f"{tmp_path.name}-served"))
    assert leaks(tmp_path) == []


def test_complete_files_are_not_downloaded_again(tmp_path: Path, hub: Hub, fetch: Fetch):
    assert fetch(tmp_path).returncode == 0
    lock = (tmp_path / "results" / "small.lock.json").read_bytes()
    hub.served.clear()
    assert fetch(tmp_path).returncode == 0
    assert hub.served == []
    assert (tmp_path / "results" / "small.lock.json").read_bytes() == lock


QUIZ = """\
task: quiz
dataset_path: org/quiz
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
metric_list: [{metric: chrf}]
"""


def test_data_of_an_evaluation_task_are_pinned_and_stored_for_jobs_without_a_network(
    tmp_path: Path, hub: Hub, fetch: Fetch
):
    """A task may name a repository, stream it, or name its files."""
    file = "hf://datasets/org/quiz/data/test-00000-of-00001.jsonl"
    as_files = QUIZ.replace("org/quiz", "json") + f"dataset_kwargs: {{data_files: {{test: ['{file}']}}}}\n"
    texts = {"quiz": QUIZ, "streamed": QUIZ + "dataset_kwargs: {streaming: true}\n", "files": as_files}
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("task: quiz", f"task: {name}"))
    tasks = {"tasks": list(texts), "files": [f"{name}.yaml" for name in texts]}
    done = fetch(tmp_path, {"stages": [{**STAGE, "export": "last", "evaluate": tasks}]})
    assert done.returncode == 0, done.stderr
    assert Lock.read(tmp_path / "results" / "small.lock.json").sources.keys() == {"tokenizer", "model", "prose"}
    (data,) = TaskDataLock.read(tmp_path / "results/small/task_data/base/quiz.json").datasets
    assert data["revision"] == COMMIT and data["path"].startswith("results/small/task_data/base/quiz/")
    hub.serve_only(tmp_path / "nothing")
    for task, path, options in (
        ("quiz", "org/quiz", {}),
        ("streamed", "org/quiz", {"streaming": True}),
        ("files", "json", {"data_files": {"test": [file]}}),
    ):
        lock = TaskDataLock.read(tmp_path / f"results/small/task_data/base/{task}.json")
        assert lock.revisions == [f"org/quiz@{COMMIT}"]
        here = [{**data, "path": str(tmp_path / data["path"])} for data in lock.datasets]
        stored = OfflineDatasets(cast("list[PinnedDataset]", here), tmp_path / "cache")
        assert stored.load(path=path, name=None, **options)["test"]["answer"] == ["2"]


def test_recorded_hashes_of_task_data_are_those_of_the_files_that_were_downloaded(
    tmp_path: Path, hub: Hub, fetch: Fetch
):
    (tmp_path / "quiz.yaml").write_text(QUIZ)
    changes = {"stages": [{**STAGE, "export": "last", "evaluate": {"tasks": ["quiz"], "files": ["quiz.yaml"]}}]}
    assert fetch(tmp_path, changes).returncode == 0
    path = tmp_path / "results/small/task_data/base/quiz.json"
    lock = TaskDataLock.read(path)
    (tmp_path / lock.datasets[0]["path"] / "test" / "cache-1.arrow").write_text("of another program")
    hub.served.clear()
    assert fetch(tmp_path, changes).returncode == 0
    assert TaskDataLock.read(path) == lock and hub.served == []
    damaged = next((tmp_path / lock.datasets[0]["path"]).glob("test/data-*.arrow"))
    damaged.write_text("damaged")
    assert fetch(tmp_path, changes).returncode == 0
    assert lock.datasets[0]["files"][f"test/{damaged.name}"] == file_sha256(damaged)


def test_fetch_of_one_task_pins_nothing_else(tmp_path: Path, hub: Hub, fetch: Fetch):
    (tmp_path / "quiz.yaml").write_text(QUIZ)
    stage = {**STAGE, "export": "last", "evaluate": {"tasks": ["quiz"], "files": ["quiz.yaml"]}}
    lock, task_lock = tmp_path / "results/small.lock.json", tmp_path / "results/small/task_data/base/quiz.json"
    found = []
    for only in ("base/other", "base/quiz", "sources"):
        for path in (lock, task_lock):
            path.unlink(missing_ok=True)
        done = fetch(tmp_path, {"stages": [stage]}, "--only", only)
        found.append((done.returncode, lock.exists(), task_lock.exists()))
        assert done.returncode == 0 or "use one of sources, base/quiz" in done.stderr
    assert found == [(2, False, False), (0, False, True), (0, True, False)]


@pytest.mark.parametrize(("repository", "reason"), [("org/none", "404 Not Found"), ("org/broken", "JSON parse error")])
def test_task_whose_data_cannot_be_downloaded_until_its_name_is_right(
    tmp_path: Path, fetch: Fetch, repository: str, reason: str
):
    (tmp_path / "quiz.yaml").write_text(QUIZ.replace("org/quiz", repository))
    stage = {**STAGE, "export": "last", "evaluate": {"tasks": ["quiz"], "files": ["quiz.yaml"]}}
    done = fetch(tmp_path, {"stages": [stage]}, "--only", "base/quiz")
    assert done.returncode == 2 and f"task quiz: cannot download the dataset {repository} of the Hub" in done.stderr
    assert reason in done.stderr and "remedy: check its name" in done.stderr
    assert not list(tmp_path.glob("results/small/task_data/**/*.json"))
    (tmp_path / "quiz.yaml").write_text(QUIZ)
    assert fetch(tmp_path, {"stages": [stage]}, "--only", "base/quiz").returncode == 0


SPLITS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "the order of the card": ({"id": "org/named", "name": "en"}, ["part-0/b.jsonl", "part-0/a.jsonl"]),
    "a split whose name starts with another's": (
        {"id": "org/named", "name": "en", "split": "train_extra"},
        ["part-1/train_extra.jsonl"],
    ),
    "the card's default configuration": ({"id": "org/named"}, ["part-2/train.jsonl"]),
    "no card, shards": ({"id": "org/bare"}, ["data/train-00000-of-00001.jsonl"]),
    "no card, shards of a split with a longer name": (
        {"id": "org/bare", "split": "train_extra"},
        ["data/train_extra-00000-of-00001.jsonl"],
    ),
    "no card, folders": ({"id": "org/folders"}, ["training/x.jsonl"]),
    "no card, a folder with another word for the split": (
        {"id": "org/folders", "split": "validation"},
        ["dev/y.jsonl"],
    ),
    "no card, no split": ({"id": "org/unsplit"}, ["anything.csv"]),
}


@pytest.mark.parametrize(("source", "expected"), SPLITS.values(), ids=SPLITS)
def test_the_files_of_a_split_are_those_that_datasets_reads(
    tmp_path: Path, hub: Hub, fetch: Fetch, source: dict[str, Any], expected: list[str]
):
    done = fetch(tmp_path, {"datasets": {"prose": {"kind": "text", "hub": source}}})
    assert done.returncode == 0, done.stderr
    prose = Lock.read(tmp_path / "results" / "small.lock.json").sources["prose"]
    assert [str(Path(file).relative_to(prose["path"])) for file in prose["files"]] == expected
    assert prose["revision"] == COMMIT
    downloaded = {name.removeprefix(f"{source['id']}/") for name in hub.served if name.startswith(source["id"])}
    assert downloaded - {"README.md"} == set(expected)


def test_only_the_first_documents_are_streamed(tmp_path: Path, hub: Hub, fetch: Fetch):
    """`datasets` reads at most one file ahead. Another number of documents is another file; the same number is kept."""
    parquet = tmp_path / "served" / "datasets" / "org" / "columns" / "train.parquet"
    parquet.parent.mkdir()
    for file in range(6):
        path = tmp_path / "served" / "datasets" / "org" / "many" / f"train-0000{file}-of-00006.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": f"{file}.{row}", "id": row}) + "\n" for row in range(3)))
    pyarrow.parquet.write_table(pa.table({"id": [b"\xff"] * 3, "text": ["p", "q", "r"]}), parquet, row_group_size=1)

    def texts(count: int, source: dict[str, Any]) -> list[str]:
        changes = {"datasets": {"prose": {"kind": "text", "hub": {**source, "max_documents": count}}}}
        done = fetch(tmp_path, changes)
        assert done.returncode == 0, done.stderr
        prose = Lock.read(tmp_path / "results" / "small.lock.json").sources["prose"]
        (file,) = prose["files"]
        rows = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
        assert prose["revision"] == COMMIT and prose["documents"] == len(rows)
        assert all(set(row) == {"text"} for row in rows)
        return [row["text"] for row in rows]

    many = {"id": "org/many"}
    assert texts(1, many) == ["0.0"]
    assert texts(3, many) == ["0.0", "0.1", "0.2"]
    first_two = {f"org/many/train-0000{file}-of-00006.jsonl" for file in range(2)}
    assert {name for name in hub.served if "many" in name} <= first_two
    hub.served.clear()
    assert texts(3, many) == ["0.0", "0.1", "0.2"] and hub.served == []
    assert len(texts(99, many)) == 18
    assert texts(2, {"id": "org/columns"}) == ["p", "q"]


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "a missing model": ({"model": {"pretrained": {"hub": {"id": "org/none"}}}}, "cannot fetch model org/none at main"),
    "no safetensors": (
        {"model": {"pretrained": {"hub": {"id": "org/pickle"}}}},
        "has no weights (*.safetensors",
    ),
    "a missing revision": ({"tokenizer": {"hub": {"id": "org/base", "revision": "v9"}}}, "model org/base at v9"),
    "a missing configuration": (
        {"datasets": {"prose": {"kind": "text", "hub": {"id": "org/text", "name": "fr"}}}},
        "name 'fr': BuilderConfig 'fr' not found. Available: ['en', 'de']",
    ),
    "no name but several configurations": (
        {"datasets": {"prose": {"kind": "text", "hub": {"id": "org/text"}}}},
        "Config name is missing. Please pick one among the available configs: ['en', 'de']",
    ),
    "a missing split": (
        {"datasets": {"prose": {"kind": "text", "hub": {"id": "org/text", "name": "en", "split": "trai"}}}},
        "configuration en, has no split 'trai'",
    ),
    "a missing column in a stream": (
        {
            "datasets": {
                "prose": {
                    "kind": "text",
                    "hub": {"id": "org/text", "name": "de", "max_documents": 3},
                    "columns": {"text": "body"},
                }
            }
        },
        "row 1: no column 'body'",
    ),
    "a missing split to stream": (
        {"datasets": {"prose": {"kind": "text", "hub": {"id": "org/bare", "split": "dev", "max_documents": 3}}}},
        "has no split 'dev'",
    ),
    "an unsupported format": (
        {"datasets": {"prose": {"kind": "text", "hub": {"id": "org/pictures"}}}},
        "the format of train/cat.png is not supported",
    ),
    "a dataset script": (
        {"datasets": {"prose": {"kind": "text", "hub": {"id": "org/scripted"}}}},
        "Dataset scripts are no longer supported, but found scripted.py",
    ),
    "a missing dataset": (
        {"datasets": {"prose": {"kind": "text", "hub": {"id": "org/none"}}}},
        "fetch dataset org/none",
    ),
    "a model too small for the sequence": (
        {"stages": [{**STAGE, "sequence_length": 256}]},
        "256 exceeds the model's max_position_embeddings 128",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), ERRORS.values(), ids=ERRORS)
def test_a_download_error_is_reported(tmp_path: Path, hub: Hub, fetch: Fetch, changes: dict[str, Any], expected: str):
    done = fetch(tmp_path, changes)
    assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert "remedy: " in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "results" / "small.lock.json").exists()


def _prose(hub: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"datasets": {"prose": {"kind": "text", **({"hub": hub} if hub else {}), **keys}}}


FOLLOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "a missing configuration": ("`name` to one of its configurations", _prose({"id": "org/text", "name": "de"})),
    "no name but several configurations": ("or download it and set `files`", _prose({}, files=["own.jsonl"])),
    "a missing split": ("`split` to one of train, test", _prose({"id": "org/text", "name": "en", "split": "test"})),
    "a missing column in a stream": (
        "`columns` to some of text",
        _prose({"id": "org/text", "name": "de", "max_documents": 3}, columns={"text": "text"}),
    ),
    "an unsupported format": ("convert the split and set `files`", _prose({}, files=["own.jsonl"])),
    "a missing dataset": ("check the name", _prose({"id": "org/text", "name": "en"})),
    "a missing revision": ("check the name", {}),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_after_the_remedy_the_sources_are_pinned(tmp_path: Path, hub: Hub, fetch: Fetch, name: str):
    says, changes = FOLLOWED[name]
    assert says in fetch(tmp_path, ERRORS[name][0]).stderr.partition("remedy: ")[2]
    (tmp_path / "own.jsonl").write_text('{"text": "a"}\n')
    done = fetch(tmp_path, changes)
    assert done.returncode == 0 and (tmp_path / "results/small.lock.json").exists(), done.stderr


@pytest.mark.parametrize("file", ["tokenizer_config.json", "generation_config.json"])
def test_a_key_that_would_replace_a_method_is_refused(tmp_path: Path, hub: Hub, fetch: Fetch, file: str):
    (tmp_path / "served/models/org/base" / file).write_text('{"save_pretrained": 1}')
    done = fetch(tmp_path)
    assert done.returncode == 2 and f"{file}: 'save_pretrained' is a name that transformers'" in done.stderr
    assert "remedy: correct " in done.stderr and not (tmp_path / "results/small.lock.json").exists()
    key = {"tokenizer_config.json": "tokenizer", "generation_config.json": "model.pretrained"}[file]
    assert f"for a {key}.hub, do it in a copy of its folder, and use that as {key}.path" in done.stderr


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("sources", "cannot fetch model org/base at v1 from the hub"),
        ("base/quiz", "task quiz: cannot download the dataset org/quiz of the Hub: [Errno 111] Connection refused"),
    ],
)
def test_a_missing_network_is_reported(tmp_path: Path, only: str, message: str):
    (tmp_path / "quiz.yaml").write_text(QUIZ)
    stage = {**STAGE, "export": "last", "evaluate": {"tasks": ["quiz"], "files": ["quiz.yaml"]}}
    config = write_config(tmp_path, {**CONFIG, "stages": [stage]})
    command = [sys.executable, "-m", "longhaul", "fetch", str(config), "--only", only]
    variables = environment("http://127.0.0.1:9", tmp_path / "cache")
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
