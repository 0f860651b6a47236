"""Mistakes in a config, a site file or a pretrained folder. `longhaul plan` reports them before anything starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from longhaul.cli import main
from longhaul.config.run_config import Config
from longhaul.config.site_config import Site
from tests.support.check_user_errors import files_below, refused_message, snakemake
from tests.support.pipeline_run import REPOSITORY
from tests.support.small_configs import DEEPSEEK, DEEPSEEK_V2, EMPTY_SAFETENSORS, LLAMA, write_config, write_weights
from tests.workflow.bad_configs import CONFIGS, FILES, write_files

KEYS = {*Config.model_fields, *Site.model_fields}


@pytest.mark.parametrize(("name", "config", "site", "expected"), CONFIGS, ids=[case[0] for case in CONFIGS])
def test_mistake_in_config_or_site_is_reported(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    config: dict[str, Any],
    site: dict[str, Any],
    expected: tuple[str, ...],
):
    path = write_config(tmp_path, config, site)
    write_files(tmp_path, FILES.get(name, {}))
    before = files_below(tmp_path)
    message = refused_message(capsys, "plan", str(path))
    assert [text for text in expected if text not in message] == [], message
    assert "stages is [{" not in message, "a list with an invalid item must not also be reported as too short"
    assert "expected: match pattern" not in message, "users do not read regular expressions"
    first_keys = re.findall(rf"{re.escape(str(tmp_path))}/(?:run|site)\.yaml: (\w*)", message)
    assert {*first_keys} <= KEYS | {*config, *site}, "a line must begin with the file and the key"
    assert files_below(tmp_path) == before


def assert_planned(config: Path) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["plan", str(config)])
    assert not exited.value.code


def write_model(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG_JSON))
    write_weights(folder / "model.safetensors", CONFIG_JSON)


CONFIG_JSON = {"model_type": "llama", "tie_word_embeddings": False, **LLAMA}
PRETRAINED: dict[str, tuple[Any, dict[str, str], str]] = {
    "no weights": (
        CONFIG_JSON,
        {},
        "has no weights (*.safetensors)",
    ),
    "config.json with a list": (
        [],
        {"model.safetensors": EMPTY_SAFETENSORS},
        "config.json contains a list, not keys and values",
    ),
    "4-bit weights": (
        {**CONFIG_JSON, "quantization_config": {"quant_method": "awq", "bits": 4}},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "quantization_config has quant_method 'awq', fmt None, weight_block_size None; training can start only from",
    ),
    "two rope types": (
        {**CONFIG_JSON, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "rope_scaling.rope_type 'linear' differs from rope_parameters.rope_type 'default'; keep one of them",
    ),
    "two rope bases": (
        {**CONFIG_JSON, "rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "rope_parameters.rope_theta 10000.0 differs from rope_theta 500000.0",
    ),
    "heads that cannot be shared": (
        {**CONFIG_JSON, "num_key_value_heads": 3},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    "odd head width": (
        {**CONFIG_JSON, "head_dim": 15},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "the head width is 15; rotary embeddings need an even width",
    ),
    "dropout of text": (
        {**CONFIG_JSON, "attention_dropout": "0.1"},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "model.pretrained: config.json: attention_dropout is '0.1'; expected: a valid number",
    ),
    "quantization as text": (
        {**CONFIG_JSON, "quantization_config": "x"},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "quantization_config is 'x'; it must hold keys and values",
    ),
    "too many prediction layers": (
        {**CONFIG_JSON, "num_nextn_predict_layers": 10**9},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "num_nextn_predict_layers is 1000000000; it must be an integer up to 10000",
    ),
    "FP8 without blocks": (
        {**CONFIG_JSON, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "weight_block_size [rows, columns]",
    ),
    "unknown architecture": (
        {"model_type": "rwkv"},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "model_type 'rwkv' is not supported",
    ),
    "missing size": (
        {key: value for key, value in CONFIG_JSON.items() if key != "hidden_size"},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "model.pretrained: config.json: hidden_size is missing",
    ),
    "size as a string": (
        {**CONFIG_JSON, "hidden_size": "64"},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "hidden_size is '64'; expected: a valid integer",
    ),
    "size zero": (
        {**CONFIG_JSON, "num_attention_heads": 0},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "num_attention_heads is 0; expected: greater than or equal to 1",
    ),
    "too many layers": (
        {**CONFIG_JSON, "num_hidden_layers": 10**12},
        {"model.safetensors": EMPTY_SAFETENSORS},
        "num_hidden_layers is 1000000000000; expected: less than or equal to 10000",
    ),
    **{
        f"config.json with {problem}": (
            {**CONFIG_JSON, **keys},
            {"model.safetensors": EMPTY_SAFETENSORS},
            f"model.pretrained: config.json: {expected}",
        )
        for problem, keys, expected in (
            ("a factor as text", {"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor is '4'"),
            ("a factor alone", {"rope_parameters": {"factor": 4.0}}, "rope_scaling has factor and no rope_type"),
            ("half a rotation", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 has no effect"),
            ("theta as text", {"rope_theta": "1e6"}, "rope_theta is '1e6'"),
            ("theta zero", {"rope_theta": 0}, "rope_theta is 0; it must be a number above 1"),
            (
                "a method's name",
                {"to_dict": "x"},
                "'to_dict' is a name that transformers' config classes use themselves",
            ),
            (
                "a special name",
                {"__class__": "x"},
                "'__class__' is a name that Python uses itself",
            ),
            ("theta null", {"rope_theta": None}, "rope_theta is None; it must be a number above 1"),
            (
                "a switch as text",
                {"tie_word_embeddings": "false"},
                "tie_word_embeddings is 'false'; expected: a valid boolean",
            ),
            ("biases as text", {"attention_bias": "no"}, "attention_bias is 'no'; expected: a valid boolean"),
            ("an unknown activation", {"hidden_act": "nope"}, "hidden_act is 'nope'; expected: 'silu'"),
            ("epsilon as text", {"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; expected: a valid number"),
            ("epsilon zero", {"rms_norm_eps": 0}, "rms_norm_eps is 0; expected: greater than 0"),
            ("epsilon NaN", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected: a finite number"),
            ("a negative spread", {"initializer_range": -1}, "initializer_range is -1; expected: greater than 0"),
            ("half a layer", {"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5; expected: a valid integer"),
            ("true layers", {"num_hidden_layers": True}, "num_hidden_layers is True; expected: a valid integer"),
            ("head width zero", {"head_dim": 0}, "head_dim is 0; expected: greater than or equal to 1"),
            (
                "a head width that Qwen2 must have",
                {"model_type": "qwen2", "head_dim": None},
                "head_dim is null; set it to an integer, or remove it",
            ),
            (
                "heads of unequal width",
                {"num_attention_heads": 6, "head_dim": 16},
                "hidden_size 64 is not a multiple of num_attention_heads 6",
            ),
            (
                "a negative window",
                {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": -1},
                "sliding_window is -1; expected: greater than or equal to 1",
            ),
            (
                "a window that Llama ignores",
                {"use_sliding_window": True, "sliding_window": 32},
                "use_sliding_window True has no effect in transformers' llama; it computes False",
            ),
            (
                "types of other layers",
                {"layer_types": ["full_attention"]},
                "layer_types has 1 entries; it must have num_hidden_layers, 2",
            ),
            (
                "a padding token outside",
                {"pad_token_id": 400},
                "pad_token_id is 400; it must be less than vocab_size 400",
            ),
            ("an unknown dtype", {"torch_dtype": "nope"}, "torch_dtype is 'nope'; expected: 'float64'"),
            (
                "another network",
                {"architectures": ["MistralForCausalLM"]},
                "architectures is ['MistralForCausalLM']; with model_type llama it must have LlamaForCausalLM",
            ),
            (
                "other layers",
                {"per_layer_config": {"0": {"head_dim": 8}}},
                "per_layer_config is {'0': {'head_dim': 8}}",
            ),
            (
                "experts without width",
                {**DEEPSEEK, "model_type": "deepseek_v3", "moe_intermediate_size": 0},
                "moe_intermediate_size is 0; expected: greater than or equal to 1",
            ),
            (
                "experts of an odd width",
                {**DEEPSEEK, "model_type": "deepseek_v3", "moe_intermediate_size": 33},
                "moe_intermediate_size is 33; with routed experts it must be a multiple of 8",
            ),
            (
                "too many selected experts",
                {**DEEPSEEK_V2, "model_type": "deepseek_v2", "num_experts_per_tok": 5},
                "num_experts_per_tok 5 is greater than n_routed_experts 4",
            ),
            (
                "a text for router weights",
                {**DEEPSEEK, "model_type": "deepseek_v3", "norm_topk_prob": "yes"},
                "norm_topk_prob is 'yes'; expected: a valid boolean",
            ),
            (
                "experts in every second layer",
                {**DEEPSEEK, "model_type": "deepseek_v3", "moe_layer_freq": 2},
                "moe_layer_freq 2 has no effect in transformers' deepseek_v3; it computes 1",
            ),
            (
                "V2 that scales router weights",
                {"model_type": "deepseek_v2", **DEEPSEEK_V2, "norm_topk_prob": True},
                "norm_topk_prob True has no effect in transformers' deepseek_v2",
            ),
            (
                "V3 with softmax scores",
                {"model_type": "deepseek_v3", **DEEPSEEK, "scoring_func": "softmax"},
                "scoring_func 'softmax' has no effect in transformers' deepseek_v3",
            ),
        )
    },
    "missing weights file": (
        CONFIG_JSON,
        {
            "1.safetensors": EMPTY_SAFETENSORS,
            "model.safetensors.index.json": '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}',
        },
        "1 of 2 files in MODEL/model.safetensors.index.json are missing: 2.safetensors",
    ),
    "truncated header": (
        CONFIG_JSON,
        {"model.safetensors": EMPTY_SAFETENSORS[:-1]},
        "model.safetensors has 9 bytes and no complete safetensors header",
    ),
    "truncated data": (
        CONFIG_JSON,
        {"model.safetensors": '>\0\0\0\0\0\0\0{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}abc'},
        "model.safetensors has 73 bytes, but its header describes 86 bytes",
    ),
}


@pytest.mark.parametrize(("model", "files", "expected"), PRETRAINED.values(), ids=PRETRAINED)
def test_unusable_pretrained_folder_is_reported_until_it_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Any, files: dict[str, str], expected: str
):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in {**files, "config.json": json.dumps(model)}.items():
        (folder / name).write_text(content)
    path = write_config(tmp_path, {"model": {"pretrained": {"path": "model"}}})
    assert expected.replace("MODEL", str(folder)) in refused_message(capsys, "plan", str(path))
    shutil.rmtree(folder)
    write_model(folder)
    assert_planned(path)


@pytest.mark.parametrize("axis", ["pipeline", "sequence"])
def test_sliding_window_that_the_layout_would_ignore_is_reported_until_the_remedy_is_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], axis: str
):
    window = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG_JSON, **window}))
    write_weights(tmp_path / "model.safetensors", {**CONFIG_JSON, **window})
    layout = {"stages.0.parallel": {axis: 2}, "stages.0.gpus_per_node": 2, "model": {"pretrained": {"path": "."}}}
    message = refused_message(capsys, "plan", str(write_config(tmp_path, layout)))
    assert f"parallel.{axis} 2 with sequence_length 64: the model's sliding_window 32" in message
    assert f"set parallel.{axis} to 1, or sequence_length to at most 32" in message
    for remedy in ({f"stages.0.parallel.{axis}": 1}, {"stages.0.sequence_length": 32}):
        assert_planned(write_config(tmp_path, {**layout, **remedy}))


def test_deep_json_and_devices_in_a_pretrained_folder_are_reported_until_it_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_config(tmp_path, {"model": {"pretrained": {"path": "model"}}})
    (tmp_path / "model").mkdir()
    config, weights = tmp_path / "model" / "config.json", tmp_path / "model" / "model.safetensors"
    config.write_text("[" * 100_000)
    assert "model.pretrained.path: cannot read" in refused_message(capsys, "plan", str(path))
    config.unlink()
    config.symlink_to("/dev/zero")
    assert "config.json is not a file" in refused_message(capsys, "plan", str(path))
    config.unlink()
    config.write_text(json.dumps(CONFIG_JSON))
    os.mkfifo(weights)
    assert "model.safetensors is not a file" in refused_message(capsys, "plan", str(path))
    weights.unlink()
    write_model(tmp_path / "model")
    assert_planned(path)


@pytest.mark.parametrize("name", ["model", "model/config.json", "model/model.safetensors"])
def test_loop_of_links_in_a_pretrained_folder_is_reported(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_config(tmp_path, {"model": {"pretrained": {"path": "model"}}})
    if name != "model":
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG_JSON))
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("loop")
    (tmp_path / name).with_name("loop").symlink_to((tmp_path / name).name)
    message = refused_message(capsys, "plan", str(path))
    assert "error: model.pretrained.path" in message and str(tmp_path / name) in message


def test_complete_pretrained_folder_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path)
    assert_planned(write_config(tmp_path, {"model": {"pretrained": {"path": "."}}}))
    assert "base" in capsys.readouterr().out


@pytest.mark.parametrize("name", [b"a{run}.txt", b"a\n.txt", b"caf\xe9.txt"], ids=["wildcard", "line break", "Latin-1"])
def test_data_file_with_unusable_name_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: bytes):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / os.fsdecode(name)).write_text("text")
    path = write_config(tmp_path, {"datasets.prose": {"kind": "text", "files": ["data/*.txt"]}})
    assert "datasets.prose.files: " in refused_message(capsys, "plan", str(path))


def test_special_characters_reach_jobs_unchanged(tmp_path: Path):
    """Folder, config and variables contain quotes, spaces, shell expansions and braces, and pass through Snakemake's shell."""
    folder = tmp_path / "it's {run} $(touch pwned) #SBATCH"
    special = "$(touch pwned) '\" {run} #SBATCH"
    config = write_config(
        folder,
        {"storage": {"weights": special}},
        {"scheduler": "local", "partitions.0.max_nodes": 1, "environment": {"X": special}},
    )
    run = tmp_path / "run"
    run.mkdir()
    done = snakemake(run, "results/small/plan.json", "--configfile", str(config), "--forcerun", "render")
    assert done.returncode == 0, done.stderr
    copy = run / "results" / "small" / "config.yaml"
    assert yaml.safe_load(copy.read_text()) == {**yaml.safe_load(config.read_text()), "site": "site.yaml"}
    assert copy.with_name("site.yaml").read_text() == config.with_name("site.yaml").read_text()
    launch = (run / "results" / "small" / "jobs" / "environment" / "launch.sh").read_text()
    exports = [line for line in launch.splitlines() if line.startswith("export X=")]
    printed = subprocess.run(
        ["bash", "-c", f'{exports[0]}; printf %s "$X"'], cwd=run, capture_output=True, text=True, check=True
    )
    assert printed.stdout == special
    assert not [*tmp_path.rglob("pwned"), *REPOSITORY.glob("pwned")]
    shutil.rmtree(folder)
    prune = [sys.executable, "-m", "longhaul", "prune", str(copy)]
    done = subprocess.run(prune, cwd=run, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("nothing is old"), done.stderr


TEXTS: dict[str, tuple[bytes, str]] = {
    "not YAML": (b"run: [a\nseed: 1\n", "is not valid YAML"),
    "duplicate key": (b"run: a\nrun: b\n", "key 'run' occurs twice, in lines 1 and 2"),
    "a list": (b"- run\n", "expected keys and values"),
    "empty": (b"", "expected keys and values"),
    "a tab": (b"run: a\n\tseed: 1\n", "line 2"),
    "Latin-1": ("run: caf\u00e9\n".encode("latin-1"), "is not UTF-8"),
    "a Python object": (b"run: !!python/object/apply:os.system ['touch pwned']\n", "os.system is not allowed (line 1"),
    "a tag on a value of another type": (b"run: !!bool maybe\n", "tag tag:yaml.org,2002:bool is not allowed (line 1"),
    "a merge key": (b"seed: &a {x: 1}\nrun:\n  <<: *a\n", "merge keys (<<) are not part of YAML 1.2"),
    "a list as key": (b"? [a]\n: 1\n", "a list or a mapping is no key"),
    "braces of a template": (b"run: {{ env.HOME }}\n", "quote a text with braces or brackets (line 1, column 7)"),
    "200,000 keys": (b"".join(b"k%d: 1\n" % i for i in range(200_000)), "a config or site file has at most 200000"),
    "15,000 unknown keys": (b"".join(b"key%d: 1\n" % i for i in range(15_000)), "run.yaml: 14985 more problems"),
    "number with 5000 digits": (b"seed: " + b"1" * 5000 + b"\n", "a number of 5000 digits; numbers have at most 1000"),
    "hexadecimal number with 5000 digits": (b"seed: 0x" + b"f" * 5000 + b"\n", "numbers have at most 1000 (line 1"),
    "alias of itself": (b"run: &a [*a]\n", "found unconstructable recursive node"),
    "exponential aliases (billion laughs)": (
        b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (i + 1, i + 1, b",".join([b"*%c" % i] * 10)) for i in range(ord("a"), ord("j"))),
        "after its aliases (&, *) are expanded",
    ),
    "5000 nested lists": (b"run: " + b"[" * 5000 + b"]" * 5000 + b"\n", "nested too deeply"),
    "expressions of Snakemake's YAML": (
        b"__use_yte__: true\nrun: ?__import__('os').system('touch pwned')\n",
        "__use_yte__",
    ),
}


@pytest.mark.parametrize(("content", "expected"), TEXTS.values(), ids=TEXTS)
def test_unreadable_config_file_is_reported_until_it_is_corrected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, expected: str
):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert expected in refused_message(capsys, "plan", str(path))
    assert files_below(tmp_path) == {"run.yaml"}
    assert_planned(write_config(tmp_path))


@pytest.mark.parametrize("name", ["run.yaml", "site.yaml"])
def test_what_is_no_file_as_config_or_site_is_reported_until_it_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    config = write_config(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert f"{name} is a pipe or a device" in refused_message(capsys, "plan", str(config))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert "is a pipe or a device" in refused_message(capsys, "plan", str(config))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)  # root can read every file, but not this one
    message = refused_message(capsys, "plan", str(config))
    assert str(tmp_path / name) in message and ("symbolic links" in message or "Symlink loop" in message)
    (tmp_path / name).unlink()
    assert_planned(write_config(tmp_path))


def test_missing_config_is_reported_until_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "does not exist" in refused_message(capsys, "plan", str(tmp_path / "no.yaml"))
    assert "is a folder" in refused_message(capsys, "plan", str(tmp_path))
    large = tmp_path / "large.yaml"
    large.write_text("#" * 20_000_000)
    assert "has 20000000 bytes; a config or site file has at most" in refused_message(capsys, "plan", str(large))
    assert_planned(write_config(tmp_path))


@pytest.mark.parametrize("text", ["rn: a\n", "- run\n", "run: [a\n"], ids=["bad key", "no keys", "no YAML"])
def test_the_page_that_a_remedy_names_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str):
    """Also for a user who has no checkout and works in another folder."""
    (tmp_path / "run.yaml").write_text(text)
    (page,) = re.findall(
        r"remedy: .*?(/\S+\.md) (?:lists|shows)", refused_message(capsys, "plan", str(tmp_path / "run.yaml"))
    )
    assert Path(page).is_file()
