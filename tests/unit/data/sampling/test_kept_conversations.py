"""What sequences of one length keep of conversations, and lengths that keep none."""

from __future__ import annotations

import pytest

from longhaul.artifacts.artifact_schemas import DataManifest, KeptConversations
from longhaul.config.stage_config import Truncate
from longhaul.data.sampling.kept_conversations import with_kept_conversations
from longhaul.errors import InputError
from longhaul.jobs.kinds.tokenize_jobs import ChatStage
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


def kept(shards: DataManifest, length: int, truncate: Truncate) -> KeptConversations:
    stage = ChatStage(name="chat", sequence_length=length, truncate=truncate)
    (found,) = with_kept_conversations(shards, [stage, stage]).splits["train"].get("kept", [])
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


def test_a_length_that_keeps_no_conversation_is_refused_with_the_stage(shards: DataManifest):
    with pytest.raises(InputError) as refused:
        kept(shards, 8, "drop")
    assert str(refused.value).startswith(
        "stage chat: dataset corpus: with truncate drop, none of the 10 conversations of the train split has a loss token "
        "within sequence_length 8; half of them have "
    )


def test_without_sft_stages_nothing_is_counted(shards: DataManifest):
    assert with_kept_conversations(shards, []) == shards
