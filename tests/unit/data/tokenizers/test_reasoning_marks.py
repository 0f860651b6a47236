"""[THINK] and [/THINK] are tokens in answers where the tokenizer has both, and stay text everywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from longhaul.data.readers.read_documents import Document
from longhaul.data.shards.source_index import IndexedSources
from longhaul.data.tokenizers.choose_encoder import EncoderChoice
from longhaul.data.tokenizers.control_tokens import reasoning_marks
from longhaul.data.tokenizers.document_encoder import DocumentEncoder, EncodedBatch
from longhaul.jobs.kinds.tokenize_jobs import TokenizeSpec
from tests.support.chat_families import FAMILIES, MAGISTRAL, Family, make_tokenizer
from tests.support.corpora import dataset

QUOTED = "Is [/THINK] or [THINK] a token?"
REASONED = "[THINK]why[/THINK]A"


def encode(folder: Path, *messages: dict[str, Any], family: Family = MAGISTRAL, **settings: Any) -> EncodedBatch:
    """Encode one conversation."""
    manifest = make_tokenizer(family, "t", folder)
    document = Document(list(messages), "row 1", 0)
    return DocumentEncoder(manifest, dataset("chat", **settings), "tokenizers").encode([document])


def user(content: str = "Q") -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def pieces(folder: Path, ids: np.ndarray) -> list[str]:
    """Return the tokens; each letter is a token of its own."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.id_to_token(number) for number in ids.tolist()]


def in_loss(folder: Path, batch: EncodedBatch) -> list[str]:
    assert batch.mask is not None and not batch.left_out
    return pieces(folder, batch.tokens[batch.mask == 1])


@pytest.mark.parametrize("question", ["Q", QUOTED])
def test_marks_are_tokens_in_an_answer_and_text_in_a_question(tmp_path: Path, question: str):
    batch = encode(tmp_path, user(question), answer(REASONED))
    assert in_loss(tmp_path, batch) == ["[THINK]", *"why", "[/THINK]", "A", "</s>"]
    assert pieces(tmp_path, batch.tokens).count("[THINK]") == pieces(tmp_path, batch.tokens).count("[/THINK]") == 1
    assert batch.control_texts == (question == QUOTED)


@pytest.mark.parametrize("question", ["Q", QUOTED])
def test_reasoning_may_be_context_only(tmp_path: Path, question: str):
    batch = encode(tmp_path, user(question), answer(REASONED), reasoning_in_loss=False)
    assert in_loss(tmp_path, batch) == ["A", "</s>"]
    both = encode(tmp_path, user(question), answer(f"<think>first</think>{REASONED}"), reasoning_in_loss=False)
    assert in_loss(tmp_path, both) == ["A", "</s>"]
    (error,) = encode(tmp_path, user(question), answer("[THINK]why[/THINK]"), reasoning_in_loss=False).left_out
    assert "an assistant turn has no text in the loss" in error.message
    (error,) = encode(tmp_path, user(question), answer("[THINK][/THINK]")).left_out
    assert "an assistant turn has no text in the loss" in error.message


@pytest.mark.parametrize("in_loss_too", [True, False])
@pytest.mark.parametrize("question", ["Q", QUOTED])
def test_marks_that_the_template_writes_are_tokens(tmp_path: Path, question: str, in_loss_too: bool):
    batch = encode(tmp_path, user(question), answer("A", reasoning_content="why"), reasoning_in_loss=in_loss_too)
    assert in_loss(tmp_path, batch) == [*(["[THINK]", *"why", "[/THINK]"] if in_loss_too else []), "A", "</s>"]
    assert pieces(tmp_path, batch.tokens).count("[THINK]") == 1


def test_other_control_tokens_and_other_messages_open_no_hole(tmp_path: Path):
    system = {"role": "system", "content": QUOTED}
    batch = encode(tmp_path, system, user("[TH[THINK]INK]"), answer("[THINK]</s>[INST][/THINK]A[TH"))
    found = pieces(tmp_path, batch.tokens)
    assert [token for token in found if len(token) > 1 and token[0] in "[<"] == [
        "<s>",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[INST]",
        "[/INST]",
        "[THINK]",
        "[/THINK]",
        "</s>",
    ]
    assert in_loss(tmp_path, batch)[:6] == ["[THINK]", *"</s>", "["]
    reasoned = encode(tmp_path, user(), answer("A", reasoning_content="a [/THINK] b"))
    assert pieces(tmp_path, reasoned.tokens).count("[/THINK]") == 1, "that of the template"


@pytest.mark.parametrize("missing", ["[THINK]", "[/THINK]"])
def test_a_tokenizer_with_one_mark_has_no_marks(tmp_path: Path, missing: str):
    special = tuple(token for token in MAGISTRAL.special if token != missing)
    batch = encode(tmp_path, user(), answer(REASONED), family=MAGISTRAL._replace(special=special))
    assert not {"[THINK]", "[/THINK]"}.intersection(pieces(tmp_path, batch.tokens))


def test_marks_of_tokenizers():
    assert reasoning_marks(MAGISTRAL.special) == (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
    assert reasoning_marks(FAMILIES["qwen3"].special) == (("<think>", "</think>"),)


def test_shards_of_these_tokenizers_alone_are_made_again(tmp_path: Path):
    """Earlier releases encoded the marks as text; the settings are part of the name of a chunk's shards."""

    def settings(family: Family, kind: str) -> dict[str, object]:
        job = TokenizeSpec.model_construct(dataset=dataset(kind))
        tokenizer = make_tokenizer(family, "t", tmp_path / kind / family.eos)
        return IndexedSources(job, tokenizer, (), EncoderChoice("tokenizers", "")).settings("tokenizers", 0)

    assert "reasoning_marks" in settings(MAGISTRAL, "chat")
    assert "reasoning_marks" not in {**settings(MAGISTRAL, "text"), **settings(FAMILIES["qwen3"], "chat")}
