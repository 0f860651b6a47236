"""Copies the tokenizer into the export so that transformers 4, 5 and servers give the same ids, and compares them.

tokenizer.json holds the whole tokenizer: normalization, splitting, vocabulary, special tokens. transformers 5 names the class
that reads it TokenizersBackend, which older releases do not know. PreTrainedTokenizerFast is that class in all releases.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from longhaul.artifacts.atomic_files import read_json, write_json
from longhaul.config.field_types import HuggingFaceConfig
from longhaul.data.tokenizers.stress_corpus import stress_texts

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_CONFIG = "tokenizer_config.json"
_SAMPLED = 5
"""Every fifth text of the stress corpus is compared: all of them would take several seconds."""
PLAIN_CLASS = "PreTrainedTokenizerFast"
AUTO_TOKENIZER_DIFFERS = (
    "AutoTokenizer gives other token ids than the run's tokenizer, as transformers chooses its class by the model_type; load the "
    f"tokenizer with {PLAIN_CLASS}.from_pretrained, and send token ids to servers"
)


def write_tokenizer(source: Path, folder: Path) -> dict[str, object]:
    """Copy the tokenizer of `source` into the export's folder, whose config.json exists, and compare the ids that both give.

    The class is PLAIN_CLASS where tokenizer.json alone gives the run's ids; otherwise the class of `source` stays.

    Returns {"class", "texts": number of compared texts, "auto_tokenizer_equal": AutoTokenizer gives the run's ids}. It does not
    for a model of model_type qwen2 with a tokenizer of another kind: transformers 5 always takes Qwen2Tokenizer there.
    """
    for name in _FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    config = readable_by_older_releases(read_json(folder / _CONFIG))
    own = _load(source)
    texts = stress_texts(own.all_special_tokens)[::_SAMPLED]
    expected = _ids(own, texts)
    if _plain_ids(folder / "tokenizer.json", texts) == expected:
        config["tokenizer_class"] = PLAIN_CLASS
    write_json(folder / _CONFIG, config)
    is_equal = _ids(_load(folder), texts) == expected
    if not is_equal:
        print(f"export: {AUTO_TOKENIZER_DIFFERS}", flush=True)
    return {"class": config["tokenizer_class"], "texts": len(texts), "auto_tokenizer_equal": is_equal}


def readable_by_older_releases(config: HuggingFaceConfig) -> HuggingFaceConfig:
    """Return the content of tokenizer_config.json with the key that all releases have for further special tokens.

    transformers 4 expects a dict in extra_special_tokens and fails for a list. transformers 5 reads both keys.
    """
    kept = {key: value for key, value in config.items() if key not in ("backend", "is_local", "local_files_only")}
    if isinstance(kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    if kept.get("tokenizer_class") in (None, "TokenizersBackend"):
        kept["tokenizer_class"] = PLAIN_CLASS
    return kept


def _load(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)  # nosec B615  # a folder of the run


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of the texts, with what the tokenizer adds to a text."""
    return tokenizer(texts)["input_ids"]


def _plain_ids(path: Path, texts: list[str]) -> list[list[int]]:
    """Return the ids that tokenizer.json gives without code of transformers; see _ids."""
    plain = Tokenizer.from_file(str(path))
    plain.no_truncation()
    plain.no_padding()
    return [row.ids for row in plain.encode_batch(texts)]
