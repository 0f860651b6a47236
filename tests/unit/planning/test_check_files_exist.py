"""Files that a config names: data, evaluation texts, tokenizer and pretrained model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from longhaul.artifacts.artifact_schemas import Lock
from longhaul.errors import UserError
from longhaul.planning import dataset_files, evaluation_files, left_out_files, model_config
from longhaul.planning.check_files_exist import _check_file_name, changes_of_pretrained_weights, read_model_folder
from tests.support.small_configs import DEEPSEEK, DEEPSEEK_V2, EMPTY_SAFETENSORS, LLAMA, plan_of, write_weights


def test_a_file_may_be_listed_only_once(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    prose = {"kind": "text", "files": ["*.jsonl"]}
    with pytest.raises(UserError, match=r"datasets.prose.files: .*b.jsonl is the same file as .*a.jsonl"):
        plan_of(tmp_path, {"datasets.prose": prose})
    with pytest.raises(UserError, match=r"a.jsonl is listed twice"):
        plan_of(tmp_path, {"datasets.prose": {**prose, "files": ["a.jsonl", "a.jsonl"]}})


def test_an_empty_file_is_refused_unless_bad_rows_are_skipped(tmp_path: Path):
    (tmp_path / "a.jsonl").touch()
    prose = {"kind": "text", "files": ["a.jsonl"]}
    with pytest.raises(UserError, match=r"datasets.prose.files: .*a.jsonl is empty"):
        plan_of(tmp_path, {"datasets.prose": prose})
    plan_of(tmp_path, {"datasets.prose": {**prose, "bad_rows": "skip"}})


def test_files_are_sorted_within_each_pattern(tmp_path: Path):
    for name in ("b/2.txt", "b/1.txt", "b/.hidden", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    plan = plan_of(tmp_path, {"datasets.prose": {"kind": "text", "files": ["b", "*.txt"]}})
    found = [str(path.relative_to(tmp_path)) for path in dataset_files(plan.loaded, "prose")]
    assert found == ["b/1.txt", "b/2.txt", "a.txt"]


def test_files_of_a_folder_that_are_no_data_are_listed(tmp_path: Path):
    for name in ("b/1.txt", "b/README.md", "c/2.unknown", "c/LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    plan = plan_of(tmp_path, {"datasets.prose": {"kind": "text", "files": ["c", "b"], "format": "text"}})
    assert left_out_files(plan.loaded, "prose") == [tmp_path / "c/LICENSE", tmp_path / "b/README.md"]
    missing = plan_of(tmp_path, {"datasets.prose": {"kind": "text", "files": ["b"], "format": "text"}})
    (tmp_path / "b" / "1.txt").unlink()
    with pytest.raises(UserError, match=r"^datasets.prose.files: 'b' matches no file"):
        left_out_files(missing.loaded, "prose")


def test_mixed_formats_are_refused_where_left_out_files_are_listed_too(tmp_path: Path):
    for name in ("b/1.txt", "b/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    plan = plan_of(tmp_path, {"datasets.prose": {"kind": "text", "files": ["b"]}})
    (tmp_path / "b" / "2.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"^datasets.prose.files: .*/b holds files of several formats"):
        left_out_files(plan.loaded, "prose")


PROSE = {"kind": "text", "files": ["a.txt"]}


def refusal(folder: Path, changes: dict[str, Any]) -> tuple[str, str]:
    """Return message and remedy of the error that the plan of these changes ends with; FOLDER stands for `folder`."""
    with pytest.raises(UserError) as refused:
        plan_of(folder, changes)
    return refused.value.message.replace(str(folder), "FOLDER"), refused.value.hint


def test_pattern_without_a_match_is_refused(tmp_path: Path):
    assert refusal(tmp_path, {"datasets.prose": {**PROSE, "files": ["no/*.txt"]}}) == (
        "datasets.prose.files: 'no/*.txt' matches no file in FOLDER",
        "write paths relative to the config file",
    )


def test_unusable_files_are_refused_until_the_remedy_is_followed(tmp_path: Path):
    (tmp_path / "a.txt").touch()
    assert refusal(tmp_path, {"datasets.prose": PROSE}) == (
        "datasets.prose.files: FOLDER/a.txt is empty",
        "fill or remove the file, or set the dataset's bad_rows to skip",
    )
    assert plan_of(tmp_path, {"datasets.prose": {**PROSE, "bad_rows": "skip"}})
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "a.txt").unlink()
    assert plan_of(tmp_path, {"datasets.prose": {**PROSE, "files": ["*.txt"]}})
    (tmp_path / "b.txt").unlink()
    (tmp_path / "a.txt").write_text("text")
    assert refusal(tmp_path, {"datasets.prose": {**PROSE, "files": ["*.txt", "a.txt"]}}) == (
        "datasets.prose.files: FOLDER/a.txt is listed twice",
        "list each file once",
    )
    assert plan_of(tmp_path, {"datasets.prose": {**PROSE, "files": ["*.txt"]}})


@pytest.mark.parametrize("bad", ["{", "}", "\n", "\x1f", "\ud800", "\udfff"])
def test_name_that_snakemake_or_json_cannot_represent_is_refused_until_it_is_renamed(tmp_path: Path, bad: str):
    with pytest.raises(UserError) as refused:
        _check_file_name("key", Path(f"a{bad}b"))
    assert refused.value.message == (
        f"key: the path {f'a{bad}b'!r} contains {bad!r}, which Snakemake or JSON cannot represent"
    )
    assert refused.value.hint == "rename the file or its folder"
    _check_file_name("key", Path("a_b"))


def test_other_special_characters_may_be_in_a_name():
    _check_file_name("key", Path("a |~\x7f\ud7ff\ue000é[]$'\"b"))


def test_evaluation_files_are_expanded_and_must_not_be_empty(tmp_path: Path):
    for name in ("a.txt", "evals/2.txt", "evals/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    prose = {**PROSE, "bad_rows": "skip", "decontaminate": {"files": ["evals"]}}
    plan = plan_of(tmp_path, {"datasets.prose": prose})
    assert evaluation_files(plan.loaded, "prose") == [tmp_path / "evals/1.txt", tmp_path / "evals/2.txt"]
    assert evaluation_files(plan.loaded, "chats") == []
    (tmp_path / "evals/1.txt").write_text("")
    assert refusal(tmp_path, {"datasets.prose": prose}) == (
        "datasets.prose.decontaminate.files: FOLDER/evals/1.txt is empty",
        "fill or remove the file",
    )
    (tmp_path / "evals/1.txt").unlink()
    assert plan_of(tmp_path, {"datasets.prose": prose})


def test_files_below_a_folder_are_found_at_any_depth(tmp_path: Path):
    for name in ("data/x/y/1.txt", "data/2.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "data/folder.txt").mkdir()
    plan = plan_of(tmp_path, {"datasets.prose": {**PROSE, "files": ["data"]}})
    assert dataset_files(plan.loaded, "prose") == [tmp_path / "data/2.txt", tmp_path / "data/x/y/1.txt"]
    plan = plan_of(tmp_path, {"datasets.prose": {**PROSE, "files": ["data/*.txt"]}})
    assert dataset_files(plan.loaded, "prose") == [tmp_path / "data/2.txt"]


def test_tokenizer_folder_and_chat_template_must_exist(tmp_path: Path):
    existing = {"tokenizer": {"path": "tokens"}}
    assert refusal(tmp_path, existing) == (
        "tokenizer.path: FOLDER/tokens has no tokenizer.json",
        "give the path of a Hugging Face tokenizer folder",
    )
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/tokenizer.json").write_text("{}")
    plan_of(tmp_path, existing)
    with_template = {"tokenizer": {"path": "tokens", "chat_template": "chat.jinja"}}
    assert refusal(tmp_path, with_template) == (
        "tokenizer.chat_template: FOLDER/chat.jinja is not a file",
        "give the path of a Jinja file",
    )
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    plan_of(tmp_path, with_template)


CONFIG_JSON = {"model_type": "llama", "tie_word_embeddings": False, **LLAMA}


def model_folder(folder: Path, files: dict[str, str]) -> Path:
    """Write these files and a config.json to a folder."""
    folder.mkdir()
    for name, text in {"config.json": json.dumps(CONFIG_JSON), **files}.items():
        (folder / name).write_text(text)
    return folder


# files of the folder, expected message, expected remedy
FOLDERS: dict[str, tuple[dict[str, str], str, str]] = {
    "no weights": (
        {"pytorch_model.bin": "pickle"},
        "key: FOLDER has no weights (*.safetensors)",
        "use a model with weights, or train from random weights: set an architecture instead of pretrained",
    ),
    "list in config.json": (
        {"config.json": "[]"},
        "key: FOLDER/config.json contains a list, not keys and values",
        "give the path of a Hugging Face model folder",
    ),
    "invalid config.json": (
        {"config.json": "{"},
        "key: cannot read FOLDER/config.json: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "give the path of a Hugging Face model folder",
    ),
    "missing weights": (
        {
            "a.safetensors": EMPTY_SAFETENSORS,
            "model.safetensors.index.json": json.dumps(
                {"weight_map": {name: f"{name}.safetensors" for name in "abcdeb"}}
            ),
        },
        "key: 4 of 5 files in FOLDER/model.safetensors.index.json are missing: b.safetensors, c.safetensors, d.safetensors",
        "complete the download",
    ),
    "list in the index": (
        {"a.safetensors": EMPTY_SAFETENSORS, "model.safetensors.index.json": "[]"},
        "key: FOLDER/model.safetensors.index.json contains a list, not keys and values",
        "give the path of a Hugging Face model folder",
    ),
    "list in generation_config.json": (
        {"a.safetensors": EMPTY_SAFETENSORS, "generation_config.json": "[]"},
        "key: FOLDER/generation_config.json contains a list, not keys and values",
        "give the path of a Hugging Face model folder",
    ),
    "method's name in generation_config.json": (
        {"a.safetensors": EMPTY_SAFETENSORS, "generation_config.json": '{"to_dict": 1}'},
        "model.pretrained: generation_config.json: 'to_dict' is a name that transformers' generation classes use themselves; "
        "remove this key",
        "correct or remove the model's generation_config.json; for a model.pretrained.hub, do it in a copy of its folder, and "
        "use that as model.pretrained.path",
    ),
}


@pytest.mark.parametrize(("files", "message", "remedy"), FOLDERS.values(), ids=FOLDERS)
def test_incomplete_model_folder_is_refused(tmp_path: Path, files: dict[str, str], message: str, remedy: str):
    folder = model_folder(tmp_path / "model", files)
    with pytest.raises(UserError) as refused:
        read_model_folder(folder, "key")
    assert (refused.value.message.replace(str(folder), "FOLDER"), refused.value.hint) == (message, remedy)


@pytest.mark.parametrize("corrected", ["{}", None])
def test_a_corrected_copy_of_a_model_folder_is_accepted(tmp_path: Path, corrected: str | None):
    files = {"a.safetensors": EMPTY_SAFETENSORS, "generation_config.json": '{"to_dict": 1}'}
    folder = model_folder(tmp_path / "model", files)
    with pytest.raises(UserError, match="generation_config"):
        read_model_folder(folder, "key")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    if corrected is None:
        (copy / "generation_config.json").unlink()
    else:
        (copy / "generation_config.json").write_text(corrected)
    assert read_model_folder(copy, "key")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("config.json", "give the path of a Hugging Face model folder"),
        ("model.safetensors", "complete the download"),
    ],
)
def test_folder_in_the_place_of_a_file_is_refused(tmp_path: Path, name: str, remedy: str):
    folder = model_folder(tmp_path / "model", {"model.safetensors": EMPTY_SAFETENSORS})
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(UserError) as refused:
        read_model_folder(folder, "key")
    assert (refused.value.message, refused.value.hint) == (f"key: {folder / name} is not a file", remedy)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling has factor and no rope_type, so nothing would be scaled"),
        (
            {**DEEPSEEK_V2, "model_type": "deepseek_v2", "topk_method": "best"},
            "topk_method is 'best'; expected: 'greedy' or 'group_limited_greedy'",
        ),
        (
            {**DEEPSEEK_V2, "model_type": "deepseek_v2", "num_key_value_heads": 2},
            "num_key_value_heads is 2; with latent attention it must be num_attention_heads, 4",
        ),
        (
            {**DEEPSEEK, "model_type": "deepseek_v3", "n_group": DEEPSEEK["n_routed_experts"]},
            "n_routed_experts 4 in n_group 4 groups is 1 expert per group; a group needs at least 2",
        ),
        (
            {**DEEPSEEK, "model_type": "deepseek_v3", "n_group": None},
            "n_group is None; expected: a valid integer",
        ),
    ],
)
def test_keys_that_the_network_would_not_follow_are_refused(tmp_path: Path, keys: dict[str, Any], problem: str):
    config = json.dumps({**CONFIG_JSON, **keys})
    model_folder(tmp_path / "start", {"model.safetensors": EMPTY_SAFETENSORS, "config.json": config})
    message, remedy = refusal(tmp_path, {"model": {"pretrained": {"path": "start"}}})
    assert message.startswith(f"model.pretrained: config.json: {problem}")
    assert remedy == "correct the model's config.json"


def test_complete_model_folder_gives_its_config(tmp_path: Path):
    index = json.dumps({"weight_map": {"x": "a.safetensors"}})
    files = {"a.safetensors": EMPTY_SAFETENSORS, "model.safetensors.index.json": index, "other.index.json": "{}"}
    assert read_model_folder(model_folder(tmp_path / "model", files), "key") == CONFIG_JSON


def test_local_model_is_planned_with_its_sizes(tmp_path: Path):
    write_weights(model_folder(tmp_path / "start", {}) / "model.safetensors", CONFIG_JSON)
    plan = plan_of(tmp_path, {"model": {"pretrained": {"path": "start"}}})
    found = model_config(plan.loaded, None)
    assert found and {key: found[key] for key in LLAMA} == LLAMA
    assert plan.deferred_checks == ()
    assert refusal(tmp_path, {"model": {"pretrained": {"path": "nowhere"}}})[0].startswith(
        "model.pretrained.path: cannot read FOLDER/nowhere/config.json: "
    )


def test_hub_model_has_the_sizes_that_fetch_recorded(tmp_path: Path):
    plan = plan_of(tmp_path, {"model": {"pretrained": {"hub": {"id": "org/model"}}}})
    assert model_config(plan.loaded, None) is model_config(plan.loaded, Lock()) is None
    found = model_config(plan.loaded, Lock(model=CONFIG_JSON))
    assert found and {key: found[key] for key in LLAMA} == LLAMA
    assert changes_of_pretrained_weights(plan.loaded, None) == ()


def test_a_missing_number_of_key_heads_is_the_default_of_transformers(tmp_path: Path):
    """128 for DeepSeek-V3, num_attention_heads for DeepSeek-V2."""
    plan = plan_of(tmp_path, {"model": {"pretrained": {"hub": {"id": "org/model"}}}})
    keys = {key: value for key, value in DEEPSEEK.items() if key != "num_key_value_heads"}
    v2 = {**keys, "model_type": "deepseek_v2", "topk_method": "group_limited_greedy"}
    assert model_config(plan.loaded, Lock(model=v2)) == v2
    with pytest.raises(UserError, match=r"num_attention_heads 4 is not a multiple of num_key_value_heads 128"):
        model_config(plan.loaded, Lock(model={**keys, "model_type": "deepseek_v3"}))
    v3 = {**keys, "model_type": "deepseek_v3", "num_attention_heads": 128}
    assert model_config(plan.loaded, Lock(model=v3)) == v3


def test_unreadable_format_of_a_hub_model_is_refused(tmp_path: Path):
    plan = plan_of(tmp_path, {"model": {"pretrained": {"hub": {"id": "org/model"}}}})
    awq = Lock(model={**CONFIG_JSON, "quantization_config": {"quant_method": "awq"}})
    with pytest.raises(UserError, match=r"^model.pretrained: quantization_config has quant_method 'awq'"):
        model_config(plan.loaded, awq)


def test_changes_of_a_pretrained_folder_are_named_but_not_those_of_an_architecture(tmp_path: Path):
    config = {**CONFIG_JSON, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 64]}}
    folder = model_folder(tmp_path / "start", {"config.json": json.dumps(config)})
    write_weights(folder / "model.safetensors", config)
    plan = plan_of(tmp_path, {"model": {"pretrained": {"path": "start"}}})
    sentence = "FP8 weights with scales for blocks of 128 x 64 were dequantized to fp32."
    assert changes_of_pretrained_weights(plan.loaded, None) == plan.pretrained_changes == (sentence,)
    assert changes_of_pretrained_weights(plan_of(tmp_path).loaded, Lock(model=config)) == ()
    fetched = plan_of(tmp_path, {"model": {"pretrained": {"hub": {"id": "org/model"}}}}, lock=Lock(model=config))
    assert fetched.pretrained_changes == (sentence,)
