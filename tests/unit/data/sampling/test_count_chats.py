"""Counts of the conversations that fit into sequences of a length, and lengths into which none fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.artifacts.artifact_schemas import ConversationCounts, DataManifest, KeptConversations
from longhaul.config.stage_config import Truncate
from longhaul.data.sampling.count_chats import run
from longhaul.errors import InputError, UserError
from longhaul.jobs.kinds.count_chats_job import ChatStage, CountChatsSpec
from tests.support.corpora import dataset, make_shards, make_tokenizer, text, write_jsonl


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> DataManifest:
    """Return 4 chats of some 30 tokens and 6 of more than 300, whose answers are at the end. None is held out."""
    folder = tmp_path_factory.mktemp("chats")
    make_tokenizer(folder, [write_jsonl(folder / "corpus.jsonl", "text", (text(i) for i in range(200)))])
    questions = ["Why?"] * 4 + ["Why is the haul so long? " * 60] * 6
    chats = [
        [{"role": "user", "content": f"{i} {question}"}, {"role": "assistant", "content": "So."}]
        for i, question in enumerate(questions)
    ]
    file = write_jsonl(folder / "chats.jsonl", "messages", chats)
    return make_shards(folder, folder, [file], dataset("chat", validation_fraction=0))


def job(shards: DataManifest, *stages: ChatStage) -> CountChatsSpec:
    folder = Path(shards.path).parent
    out = str(folder / "kept.json")
    return CountChatsSpec(run="test", dataset="corpus", stages=stages, data=str(folder / "data.json"), out=out)


def kept(shards: DataManifest, length: int, truncate: Truncate) -> KeptConversations:
    stage = ChatStage(name="chat", sequence_length=length, truncate=truncate)
    counted = job(shards, stage, stage)
    run(counted)
    written = ConversationCounts.read(Path(counted.out))
    assert written.data_hash == shards.hash and written.splits["validation"] == []
    (found,) = written.splits["train"]
    return found


def counts(found: KeptConversations) -> list[int]:
    keys = ("documents", "cut_documents", "dropped_documents", "documents_without_loss")
    return [found.get(key, 0) for key in keys]


def test_what_is_kept_of_long_conversations_follows_truncate(shards: DataManifest):
    assert counts(kept(shards, 10_000, "right")) == [10, 0, 0, 0]
    assert counts(kept(shards, 128, "right")) == [4, 0, 0, 6]
    assert counts(kept(shards, 128, "drop")) == [4, 0, 6, 0]
    assert counts(kept(shards, 128, "left")) == [10, 6, 0, 0]
    short = kept(shards, 128, "drop")["tokens"]
    assert kept(shards, 128, "left")["tokens"] == short + 6 * 128


def test_a_length_that_keeps_no_conversation_is_refused_until_the_remedy_is_followed(shards: DataManifest):
    with pytest.raises(InputError) as refused:
        kept(shards, 8, "drop")
    assert str(refused.value).startswith(
        "stage chat: dataset corpus: with truncate drop, none of the 10 conversations of the train split has a loss token "
        "within sequence_length 8; half of them have "
    )
    assert kept(shards, 128, "drop")["documents"] and kept(shards, 8, "left")["documents"]


@pytest.mark.parametrize("ending", ["idx", "mask"])
def test_altered_lengths_and_masks_are_refused(shards: DataManifest, ending: str):
    """The counts would be wrong without a word."""
    file = next(Path(shards.path).glob(f"*/train*.{ending}"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        with pytest.raises(UserError, match=f"dataset corpus: {file} does not have the hash") as refused:
            kept(shards, 128, "right")
    finally:
        file.write_bytes(data)
    assert f"rm -r {file.parent} " in refused.value.hint


def test_names_and_order_of_stages_do_not_count_again(shards: DataManifest):
    short = ChatStage(name="a", sequence_length=64, truncate="right")
    long = ChatStage(name="b", sequence_length=128, truncate="right")
    key = job(shards, short, long).rerun_key()
    renamed = [stage.model_copy(update={"name": f"{stage.name}2"}) for stage in (long, short, long)]
    assert job(shards, *renamed).rerun_key() == key
    assert job(shards, short).rerun_key() != key
