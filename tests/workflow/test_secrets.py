"""Secrets of the environment are in no file that a run writes: results, logs, rendered scripts, Snakemake's own records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from chain import SECRETS, Chain, leaks


def test_a_whole_run_keeps_them_to_itself(finished: Chain):
    written = [path for path in finished.folder.rglob("*") if path.is_file()]
    kinds = {path.relative_to(finished.folder).parts[0] for path in written}
    assert {"results", ".snakemake"} <= kinds and any(path.suffix == ".log" for path in written)
    assert leaks(finished.folder) == []


def test_every_job_had_them(finished: Chain, tmp_path: Path):
    """What the supervisor starts inherits the environment, so the test above is not empty."""
    probe = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    launch = json.loads((finished.results / "stages/chat/launch.json").read_text())
    launch["folder"] = str(tmp_path)
    launch["steps"] = [{"title": "probe", "command": [sys.executable, "-c", probe, str(tmp_path / "seen.json")]}]
    (tmp_path / "launch.json").write_text(json.dumps(launch))
    command = [sys.executable, "-m", "longhaul", "supervise", str(tmp_path / "launch.json")]
    subprocess.run(command, cwd=finished.folder, env=finished.environment(), check=True, capture_output=True)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {name: seen.get(name) for name in SECRETS} == SECRETS


def test_what_looks_for_them_finds_them(tmp_path: Path):
    (tmp_path / "log").write_text(f"token={SECRETS['HF_TOKEN']}!")
    assert leaks(tmp_path) == [f"{tmp_path / 'log'}: HF_TOKEN"]
