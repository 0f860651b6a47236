"""The tokenizer and the shards that all cases of the parity table share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from longhaul.config.shipped_files import data_root
from tests.support.corpora import conversation, dataset, make_shards, make_tokenizer, text, write_jsonl


def write_shared_data(folder: Path) -> Path:
    """Write tokenizer and shards; return the folder.

    Some packs hold one conversation that is truncated, others several short conversations. The texts are less than ten batches,
    so that one of these has the window that ends with padding.
    """
    folder.mkdir(parents=True)
    texts = [message["content"] for number in range(60) for message in conversation(number)]
    chatml = data_root() / "templates" / "chat" / "chatml.jinja"
    tokenizer = make_tokenizer(folder, [write_jsonl(folder / "corpus.jsonl", "text", texts)], chat_template=str(chatml))
    # As with the many tokenizers that have no padding token.
    replace(tokenizer, pad_id=tokenizer.eos_id).write(folder / "tokenizer.json")
    conversations = [
        _long_conversation(number) if number % 4 == 0 else _short_conversation(number) for number in range(360)
    ]
    chats = write_jsonl(folder / "chats.jsonl", "messages", conversations)
    make_shards(folder / "chats", folder, [chats], dataset("chat", validation_fraction=0.1))
    documents = write_jsonl(folder / "texts.jsonl", "text", [text(number) for number in range(60)])
    make_shards(folder / "texts", folder, [documents], dataset("text", validation_fraction=0.1))
    return folder


def _long_conversation(number: int) -> list[dict[str, Any]]:
    """Return a conversation whose answer begins within a sample and ends behind it."""
    return [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": text(number)}]


def _short_conversation(number: int) -> list[dict[str, Any]]:
    """Return a conversation so short that two or three fit into a sample."""
    return [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"{7 * number}."}]
