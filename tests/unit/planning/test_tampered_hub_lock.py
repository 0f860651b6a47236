"""A lock file with any content gives a plan that can be rendered, or an error with the name of the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.artifacts.paths import RunPaths
from longhaul.cli import main
from longhaul.errors import UserError
from longhaul.jobs.launch_files import render_run
from tests.support.corpora import write_jsonl
from tests.support.small_configs import STAGE, plan_of, write_config
from tests.support.tampered_files import tampered_texts

CONFIG = {"datasets.chats": {"kind": "chat", "hub": {"id": "org/chats", "split": "train"}}}


def test_no_tampered_lock_ends_in_a_traceback(tmp_path: Path):
    path = tmp_path / "run.lock.json"
    source = {"hub": "org/chats", "revision": "0123", "path": "/hub/chats", "files": ["/hub/chats/a.jsonl"]}
    Lock({"chats": source}).write(path)  # type: ignore[dict-item]
    assert render_run(plan_of(tmp_path, CONFIG, lock=Lock.read(path)), tmp_path)
    refused = 0
    for change, text in tampered_texts(path.read_bytes()):
        path.write_bytes(text)
        try:
            render_run(plan_of(tmp_path, CONFIG, lock=Lock.read(path)), tmp_path)
        except UserError as error:
            refused += 1
            assert error.hint and "delete it" not in error.hint, change
        except Exception as error:
            raise AssertionError(change) from error
    assert refused > 10


@pytest.mark.parametrize("text", ["{}", '{"artifact": "Lock", "schema_version": 1, "sources": []}'])
def test_the_remedy_pins_again_instead_of_deleting(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "prose.jsonl", "text", ["a"])
    prose = {"kind": "text", "files": [str(tmp_path / "prose.jsonl")]}
    config = write_config(tmp_path, {"datasets": {"prose": prose}, "stages": [STAGE]})
    lock = RunPaths("small").lock
    lock.parent.mkdir()
    lock.write_text(text)
    with pytest.raises(UserError) as refused:
        Lock.read(lock)
    assert "longhaul fetch" in refused.value.hint
    with pytest.raises(SystemExit) as ended:
        main(["fetch", str(config)])
    assert ended.value.code == 0 and Lock.read(lock).sources == {}
