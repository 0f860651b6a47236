"""Hypothesis strategies for what people write: configs, site files, data files, chat rows, model folders."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hypothesis import strategies as st

from longhaul.config.run_config import Config
from longhaul.config.site_config import Site
from tests.support.small_configs import CONFIG, DEEPSEEK, EMPTY_SAFETENSORS, LLAMA, SITE, changed

Json = Any
TEXTS = st.sampled_from(
    [
        *("", " ", "x", "a/b", "..", "~", "/", ".", "a**b", "**", "/dev/zero", "no", "1:30:00", "010", "1e400"),
        *("{{ env.HOME }}", "{instruction}\n{input}", "{", "$(touch x)", "'; exit", "--uid=0", "%j", "\\", '"'),
        *("\x1b[31mred\x1b[0m", "\u202egnp.exe", "\x00", "\n", "\ud83d", "naïve 北京 🚢", "x" * 5000),
    ]
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 7, 8, 64, 10**6, 10**15, 10**30, 0.5, -0.1, 1e-9, 1e30, 1e300, 5e-324])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
"""Any value of JSON."""


def schema_values(  # noqa: PLR0911 - one return for each keyword of the schema
    schema: dict[str, Any], definitions: dict[str, Any]
) -> st.SearchStrategy[Json]:
    """Return a strategy for values that a JSON schema of pydantic allows, apart from most string patterns."""
    if "$ref" in schema:
        return st.deferred(lambda: schema_values(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions))
    if "anyOf" in schema:
        return st.one_of([schema_values(option, definitions) for option in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return _number_values(schema, kind == "integer")
    if kind == "array":
        items = [*schema.get("prefixItems", ()), schema.get("items") or {}]
        return st.lists(schema_values(items[0], definitions), min_size=schema.get("minItems", 0), max_size=3)
    if kind == "object":
        return _object_values(schema, definitions)
    if kind == "string":
        return (
            st.from_regex(schema["pattern"], fullmatch=True).map(lambda text: text[:40]) | TEXTS
            if "pattern" in schema
            else TEXTS
        )
    return {"boolean": st.booleans(), "null": st.none()}.get(str(kind), JSON)


def _number_values(schema: dict[str, Any], is_integer: bool) -> st.SearchStrategy[Json]:
    lowest = schema.get("minimum", schema.get("exclusiveMinimum", -10))
    highest = schema.get("maximum", schema.get("exclusiveMaximum", 10**6))
    if is_integer:
        return st.integers(lowest, min(highest, lowest + 8)) | st.integers(lowest, highest)
    return st.floats(lowest, min(highest, lowest + 1)) | st.floats(lowest, highest)


def _object_values(schema: dict[str, Any], definitions: dict[str, Any]) -> st.SearchStrategy[Json]:
    if not (properties := schema.get("properties")):
        return st.dictionaries(st.sampled_from(["prose", "chats", "other"]), JSON, max_size=2)
    values = {key: schema_values(value, definitions) for key, value in properties.items()}
    required = {key: values.pop(key) for key in schema.get("required", ()) if key in values}
    return st.fixed_dictionaries(required, optional=values)


class _Changeable(NamedTuple):
    """A key that a strategy may change: its dotted path, and values that its schema allows."""

    path: str
    values: st.SearchStrategy[Json]


def _keys_of(model: type[Any], example: dict[str, Json]) -> list[_Changeable]:
    """Return the keys of all sections. Of lists and of optional sections, those that the example has."""
    schema = model.model_json_schema()
    return list(_keys_below(schema, schema.get("$defs", {}), example, ""))


def _keys_below(
    schema: dict[str, Any], definitions: dict[str, Any], example: Json, prefix: str
) -> Iterator[_Changeable]:
    """Yield the keys below a section, a list of sections, or sections by name. prefix: path of the value, with a dot."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        for option in schema["anyOf"] if example is not None else ():
            yield from _keys_below(option, definitions, example, prefix)
    for key, value in schema.get("properties", {}).items():
        yield _Changeable(prefix + key, schema_values(value, definitions))
        inner = example.get(key) if isinstance(example, dict) else None
        yield from _keys_below(value, definitions, inner, f"{prefix}{key}.")
    if isinstance(example, list) and schema.get("type") == "array":
        for number, item in enumerate(example):
            yield from _keys_below(schema.get("items") or {}, definitions, item, f"{prefix}{number}.")
    if isinstance(example, dict) and isinstance(named := schema.get("additionalProperties"), dict):
        for name, item in example.items():
            yield from _keys_below(named, definitions, item, f"{prefix}{name}.")


_EVERY_SECTION = changed(
    CONFIG,
    {
        "model": {"deepseek_v3": DEEPSEEK},
        "scale_test": {"nodes": [1, "full"]},
        "stages.1.export": "last",
        "stages.1.evaluate": {"tasks": ["arc_easy"]},
        "stages.1.serve": {},
        "stages.1.serve_check": {},
    },
)
"""CONFIG with a mixture of experts and all optional sections of its second stage."""
_CPUS = {"jobs": ["cpu"], "name": "cpu", "max_minutes": 60, "node": {"cpus": 8, "memory_mb": 8000}}
_TWO_PARTITIONS = changed(
    SITE,
    {
        "partitions": [{**SITE["partitions"][0], "jobs": ["gpu", "debug"], "gpu_type": "h100"}, _CPUS],
        "partitions.0.node": {"cpus": 64, "memory_mb": 500_000, "gpus": 8, "gpu_memory_gib": 80.0},
    },
)
_CONFIG_KEYS = _keys_of(Config, _EVERY_SECTION)
_CONFIG_KEYS += [key for key in _keys_of(Config, CONFIG) if key.path.startswith("model.llama.")]
_SITE_KEYS = _keys_of(Site, _TWO_PARTITIONS)


@st.composite
def _changes(draw: st.DrawFn, keys: list[_Changeable]) -> dict[str, Json]:
    """Draw changes of up to three keys: seven of eight values are as the schema allows, the others are anything."""
    changes: dict[str, Json] = {}
    for key in draw(st.lists(st.sampled_from(keys), max_size=3, unique_by=lambda key: key.path)):
        changes[key.path] = draw(st.one_of(*[key.values] * 7, JSON))
    return changes


YAML_SNIPPETS = st.sampled_from(
    [
        *(
            "? [a]\n: b\n",
            "!!bool maybe",
            "{{ env.HOME }}",
            "&a [*a]",
            "<<: {a: 1}\n",
            "---\n",
            "...\n",
            "%YAML 1.1\n",
            "\t",
        ),
        *(
            "\x00",
            "\x1b[2J",
            "\u202e",
            "\ufeff",
            "- ",
            ": ",
            "#",
            "'",
            '"',
            "[",
            "}",
            "|\n",
            ">",
            "*x",
            "!!python/name:os.system",
        ),
        "\n".join(f"k{number}: 1" for number in range(3000)) + "\n",
        "[" * 3000,
    ]
)


@st.composite
def yaml_texts(draw: st.DrawFn, value: Json) -> str:
    """Draw the YAML text of a value; one of ten texts has something inserted."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    if draw(st.integers(0, 9)) == 9:
        position = draw(st.integers(0, len(text)))
        text = text[:position] + draw(YAML_SNIPPETS | st.text(max_size=4)) + text[position:]
    return text


def _try_changed(value: dict[str, Any], changes: dict[str, Json]) -> dict[str, Any]:
    for path, new in changes.items():
        try:
            value = changed(value, {path: new})
        except (AttributeError, IndexError, KeyError, TypeError):  # a change before this one replaced the section
            continue
    return value


MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "assistant", "system", "tool"]) | JSON, "content": TEXTS | JSON},
    optional={
        "tool_calls": st.lists(st.fixed_dictionaries({"name": TEXTS, "arguments": JSON}), max_size=2) | JSON,
        "reasoning_content": TEXTS | JSON,
        "weight": st.sampled_from([0, 1, 0.5]) | JSON,
        "name": JSON,
    },
)
PLAIN_CHATS = st.lists(st.text(max_size=20), min_size=1, max_size=4).map(
    lambda texts: [
        message
        for number, text in enumerate(texts)
        for message in ({"role": "user", "content": text}, {"role": "assistant", "content": f"{text} {number}"})
    ]
)
CHATS = (
    st.lists(MESSAGES, max_size=4)
    | PLAIN_CHATS
    | st.sampled_from([[], None, "x", [[]], [{"from": "gpt", "value": "x"}]])
)
CHAT_ROWS = st.fixed_dictionaries({"messages": CHATS}, optional={"tools": JSON, "id": JSON}) | st.just({"text": "x"})
"""Rows of a dataset of chats, valid ones and others."""

_GOOD = json.dumps({"text": "one", "messages": [{"role": "assistant", "content": "A"}]}).encode() + b"\n"
FILE_CONTENTS = st.one_of(
    st.sampled_from(
        [
            *(
                _GOOD,
                _GOOD * 3,
                b"",
                b"\n\n",
                _GOOD[:-9],
                b"\xef\xbb\xbf" + _GOOD,
                _GOOD.replace(b"\n", b"\r\n"),
                b"\xff\xfe",
            ),
            *(
                gzip.compress(_GOOD),
                gzip.compress(_GOOD)[:-5],
                b"\x28\xb5\x2f\xfd\x00\xff\x00\x00",
                b"PAR1 and nothing",
                b"PAR1",
            ),
            *(
                b"text,messages\na,b\n",
                b'[{"text": "one"}]',
                b"[" * 2000,
                b"ARROW1\x00\x00",
                b'{"text": 1}\n',
                b"null\n",
            ),
        ]
    ),
    CHAT_ROWS.map(lambda row: json.dumps(row).encode() + b"\n"),
    st.binary(max_size=40),
)
_SUFFIXES = ("jsonl", "JSONL", "json", "txt", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "jsonl.zst", "bin", "")
FILE_NAMES = st.builds(
    lambda folder, stem, suffix: f"{folder}{stem}.{suffix}".rstrip("."),
    st.sampled_from(["", "", "sub/", "sub/deep/"]),
    st.sampled_from(["a", "b", "README", ".hidden", "naïve 北", "{x}", "-rf", "a b"]),
    st.sampled_from(_SUFFIXES),
)
SPECIAL = st.sampled_from(["fifo", "loop", "broken link", "device", "folder", "unreadable"])
PATTERNS = st.sampled_from(
    [
        "data",
        "data/*",
        "data/**/*.jsonl",
        "data/a.jsonl",
        "data/**",
        "~",
        "/",
        "a**b",
        "data/x",
        "/dev/zero",
        "..",
        "",
        "data/[",
        "\x00",
    ]
)
_GENERATION_KEYS = TEXTS | st.sampled_from(
    ["temperature", "top_k", "max_new_tokens", "eos_token_id", "to_dict", "__dict__"]
)
_TOKENIZER_KEYS = TEXTS | st.sampled_from(
    [
        *("eos_token", "bos_token", "pad_token", "image_token", "extra_special_tokens", "additional_special_tokens"),
        *("added_tokens_decoder", "model_specific_special_tokens", "chat_template", "model_max_length", "padding_side"),
        *(
            "tokenizer_class",
            "auto_map",
            "post_processor",
            "tokenizer_object",
            "tokenizer_truncation",
            "backend",
            "vocab",
        ),
        *("_tokenizer", "__dict__", "decode", "split_special_tokens", "model_input_names", "init_inputs", "gguf_file"),
    ]
)


def _json_bytes(value: Json) -> bytes:
    return json.dumps(value).encode()


MODEL_FILES = st.fixed_dictionaries(
    {
        "config.json": st.one_of(
            st.just({"model_type": "llama", **LLAMA}),
            st.dictionaries(
                st.sampled_from([*LLAMA, "model_type", "rope_scaling", "quantization_config"]), JSON, max_size=3
            ).map(lambda changes: {"model_type": "llama", **LLAMA, **changes}),
            JSON,
        ).map(lambda value: json.dumps(value).encode()),
        "model.safetensors": st.sampled_from(
            [
                *(EMPTY_SAFETENSORS.encode(), b"", b"\xff" * 8, b"\x10\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"),
                b"\x0a\0\0\0\0\0\0\0" + b'{"a": [1]}',
                (100_000).to_bytes(8, "little") + b"[" * 100_000,
            ]
        ),
    },
    optional={
        "model.safetensors.index.json": JSON.map(lambda value: json.dumps(value).encode()),
        "tokenizer.json": st.binary(max_size=9),
        "generation_config.json": st.dictionaries(_GENERATION_KEYS, JSON, max_size=3).map(_json_bytes)
        | JSON.map(_json_bytes),
    },
)
TOKENIZER_SETTINGS = st.dictionaries(_TOKENIZER_KEYS, JSON, max_size=3)
"""Keys of tokenizer_config.json and special_tokens_map.json."""


class Inputs(NamedTuple):
    """The files of a run: path -> bytes; special: path -> one of SPECIAL."""

    files: dict[str, bytes]
    special: dict[str, str]

    def write(self, folder: Path) -> Path:
        """Write all files below a folder; return the path of run.yaml."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for name, kind in self.special.items():
            _make_special(folder / name, kind)
        return folder / "run.yaml"


def _make_special(path: Path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "unreadable":
        path.write_bytes(_GOOD)
        path.chmod(0)
    else:
        path.symlink_to({"loop": "..", "broken link": "nowhere", "device": "/dev/zero"}[kind])


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    """Draw a config, its site, a folder of data, and a model folder."""
    config_changes = draw(_changes(_CONFIG_KEYS))
    files: dict[str, bytes] = {}
    special: dict[str, str] = {}
    if draw(st.booleans()):
        files |= {
            f"data/{name}": content
            for name, content in draw(st.dictionaries(FILE_NAMES, FILE_CONTENTS, max_size=3)).items()
        }
        special |= {f"data/s{number}": kind for number, kind in enumerate(draw(st.lists(SPECIAL, max_size=1)))}
        name = draw(st.sampled_from(["prose", "chats"]))
        patterns = draw(st.lists(PATTERNS, min_size=1, max_size=2))
        config_changes |= {f"datasets.{name}": {"kind": "chat" if name == "chats" else "text", "files": patterns}}
    if draw(st.integers(0, 4)) == 4:
        files |= {f"model/{name}": content for name, content in draw(MODEL_FILES).items()}
        config_changes |= {"model": {"pretrained": {"path": "model"}}}
    config = _try_changed(draw(st.sampled_from([CONFIG, _EVERY_SECTION])), config_changes)
    site = _try_changed(draw(st.sampled_from([SITE, _TWO_PARTITIONS])), draw(_changes(_SITE_KEYS)))
    files["run.yaml"] = draw(yaml_texts(config)).encode("utf-8", "surrogatepass")
    files["site.yaml"] = draw(yaml_texts(site)).encode("utf-8", "surrogatepass")
    return Inputs(files, special)


@st.composite
def tampered(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a damaged form of a file of JSON or of JSON lines: a value is replaced or left out, or bytes are."""
    lines = content.split(b"\n")
    number = draw(st.integers(0, max(0, len(lines) - 2)))
    if draw(st.integers(0, 3)) == 3:
        position = draw(st.integers(0, len(content)))
        return content[:position] + draw(st.binary(max_size=3)) + content[position + draw(st.integers(0, 9)) :]
    is_lines = len(lines) > 1 and lines[number].startswith(b"{") and lines[number].endswith(b"}")
    value = json.loads(lines[number] if is_lines else content)
    parent, key = draw(st.sampled_from(list(_places(value))))
    if draw(st.booleans()):
        parent[key] = draw(JSON)
    else:
        del parent[key]
    text = json.dumps(value).encode()
    return b"\n".join([*lines[:number], text, *lines[number + 1 :]]) if is_lines else text


def _places(value: Json) -> Iterator[tuple[Any, Any]]:
    """Yield (dict or list, key or index) of every value below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)
