"""Whatever the lock file holds, a plan is made and rendered from it, or it is refused with its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.errors import UserError
from longhaul.jobs.launch_files import render_run
from tests.support.small_configs import plan_of
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
def test_the_remedy_pins_again_instead_of_deleting(text: str, tmp_path: Path):
    (tmp_path / "run.lock.json").write_text(text)
    with pytest.raises(UserError) as refused:
        Lock.read(tmp_path / "run.lock.json")
    assert "longhaul fetch" in refused.value.hint
