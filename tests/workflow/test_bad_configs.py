"""Mistakes in a config, a site file or a pretrained folder: told by the plan, before anything is started."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from longhaul.cli import main
from tests.support.bad_input import files_below, refused, snakemake
from tests.support.chain import REPOSITORY
from tests.support.small_configs import EMPTY_SAFETENSORS, LLAMA, write_config
from tests.workflow.bad_configs import CONFIGS


@pytest.mark.parametrize(("config", "site", "says"), [case[1:] for case in CONFIGS], ids=[case[0] for case in CONFIGS])
def test_config(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    site: dict[str, Any],
    says: tuple[str, ...],
):
    path = write_config(tmp_path, config, site)
    before = files_below(tmp_path)
    message = refused(capsys, "plan", str(path))
    assert [text for text in says if text not in message] == [], message
    assert "stages is [{" not in message, "no list is told to be too short where an item of it is wrong"
    assert files_below(tmp_path) == before


CONFIG_JSON = {"model_type": "llama", "tie_word_embeddings": False, **LLAMA}
PRETRAINED: dict[str, tuple[Any, dict[str, str], str]] = {
    "no weights": (
        CONFIG_JSON,
        {},
        "holds no weights (*.safetensors)",
    ),
    "a config that is a list": (
        [],
        {"model.safetensors": EMPTY_SAFETENSORS},
        "config.json holds a list, not keys and values",
    ),
    "weights in four bits": (
        {**CONFIG_JSON, "quantization_config": {"quant_method": "awq", "bits": 4}},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "quantization_config has quant_method 'awq', fmt None, weight_block_size None; only DeepSeek's block-scaled FP8",
    ),
    "FP8 without blocks": (
        {**CONFIG_JSON, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "weight_block_size [rows, columns]",
    ),
    "an unknown architecture": (
        {"model_type": "rwkv"},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "model_type 'rwkv' is not supported",
    ),
    "a size that is missing": (
        {key: value for key, value in CONFIG_JSON.items() if key != "hidden_size"},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "the llama config lacks hidden_size",
    ),
    "a size that is text": (
        {**CONFIG_JSON, "hidden_size": "64"},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "hidden_size of the llama config is '64', not a whole number",
    ),
    "a size of nothing": (
        {**CONFIG_JSON, "num_attention_heads": 0},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "num_attention_heads of the llama config is 0, not a whole number from 1",
    ),
    "endless layers": (
        {**CONFIG_JSON, "num_hidden_layers": 10**12},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "num_hidden_layers of the llama config is 1000000000000, not a whole number from 1",
    ),
    "half a download": (
        CONFIG_JSON,
        {
            "1.safetensors": EMPTY_SAFETENSORS,
            "model.safetensors.index.json": '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}',
        },
        "names 2.safetensors, not there (1 of 2 files)",
    ),
    "a file of half a download": (
        CONFIG_JSON,
        {"model.safetensors": EMPTY_SAFETENSORS[:-1]},
        "model.safetensors has 9 bytes and no whole safetensors header",
    ),
    "a file that lacks its end": (
        CONFIG_JSON,
        {"model.safetensors": '>\0\0\0\0\0\0\0{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}abc'},
        "model.safetensors has 73 bytes, and its header speaks of 86",
    ),
}


@pytest.mark.parametrize(("model", "files", "says"), PRETRAINED.values(), ids=PRETRAINED)
def test_pretrained_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Any, files: dict[str, str], says: str
):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in {**files, "config.json": json.dumps(model)}.items():
        (folder / name).write_text(content)
    path = write_config(tmp_path, {"model": {"pretrained": {"path": "model"}}})
    assert says in refused(capsys, "plan", str(path))


def test_a_whole_pretrained_folder_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON))
    (tmp_path / "model.safetensors").write_text(EMPTY_SAFETENSORS)
    main(["plan", str(write_config(tmp_path, {"model": {"pretrained": {"path": "."}}}))])
    assert "base" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", [b"a{run}.txt", b"a\n.txt", b"caf\xe9.txt"], ids=["a wildcard", "two lines", "Latin-1"]
)
def test_a_data_file_that_no_rule_can_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: bytes):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / os.fsdecode(name)).write_text("text")
    path = write_config(tmp_path, {"datasets.prose": {"kind": "text", "files": ["data/*.txt"]}})
    assert "datasets.prose.files: " in refused(capsys, "plan", str(path))


def test_hostile_values_arrive_as_they_are_or_not_at_all(tmp_path: Path):
    """Through Snakemake's own shell: folder, config and variables with quotes, blanks, expansions and braces."""
    folder = tmp_path / "it's {run} $(touch pwned) #SBATCH"
    hostile = "$(touch pwned) '\" {run} #SBATCH"
    config = write_config(
        folder, {"storage": {"weights": hostile}}, {"scheduler": "local", "max_nodes": 1, "environment": {"X": hostile}}
    )
    run = tmp_path / "run"
    run.mkdir()
    done = snakemake(run, "results/small/plan.json", "--configfile", str(config), "--forcerun", "render")
    assert done.returncode == 0, done.stderr
    assert (run / "results" / "small" / "config.yaml").read_text() == config.read_text()
    launch = (run / "results" / "small" / "jobs" / "environment" / "launch.sh").read_text()
    shown = [line for line in launch.splitlines() if line.startswith("export X=")]
    told = subprocess.run(
        ["bash", "-c", f'{shown[0]}; printf %s "$X"'], cwd=run, capture_output=True, text=True, check=True
    )
    assert told.stdout == hostile
    assert not [*tmp_path.rglob("pwned"), *REPOSITORY.glob("pwned")]


TEXTS: dict[str, tuple[bytes, str]] = {
    "not YAML": (b"run: [a\nseed: 1\n", "is not valid YAML"),
    "a key twice": (b"run: a\nrun: b\n", "key 'run' is written twice, in lines 1 and 2"),
    "a list": (b"- run\n", "expected keys and values"),
    "empty": (b"", "expected keys and values"),
    "a tab": (b"run: a\n\tseed: 1\n", "line 2"),
    "Latin-1": ("run: caf\u00e9\n".encode("latin-1"), "is not UTF-8"),
    "a Python object": (b"run: !!python/object/apply:os.system ['touch pwned']\n", "could not determine a constructor"),
    "a date": (b"run: 2026-01-01\n", "quote the value"),
    "a date that is none": (b"run: 2026-13-45\n", "month must be in 1..12"),
    "a number of 5000 digits": (b"seed: " + b"1" * 5000 + b"\n", "quote the value, or mend it"),
    "an alias of itself": (b"run: &a [*a]\n", "found unconstructable recursive node"),
    "a billion laughs": (
        b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (i + 1, i + 1, b",".join([b"*%c" % i] * 10)) for i in range(ord("a"), ord("j"))),
        "its aliases (&, *) followed",
    ),
    "a deep pit": (b"run: " + b"[" * 5000 + b"]" * 5000 + b"\n", "nested too deeply"),
    "expressions of Snakemake's YAML": (
        b"__use_yte__: true\nrun: ?__import__('os').system('touch pwned')\n",
        "__use_yte__",
    ),
}


@pytest.mark.parametrize(("content", "says"), TEXTS.values(), ids=TEXTS)
def test_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert says in refused(capsys, "plan", str(path))
    assert files_below(tmp_path) == {"run.yaml"}


def test_config_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "does not exist" in refused(capsys, "plan", str(tmp_path / "no.yaml"))
    assert "is a folder" in refused(capsys, "plan", str(tmp_path))
