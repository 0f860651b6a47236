"""Chat templates mark the assistant's spans, and their errors have a location."""

from __future__ import annotations

from pathlib import Path

import pytest

from longhaul.data.tokenizers.chat_template import ChatTemplate, without_reasoning
from longhaul.errors import UserError
from tests.support.chain import REPOSITORY
from tests.support.corpora import conversation, dataset, make_shards, write_jsonl

REASONING = "<think>First 40, then 2.</think>It is 42."


def test_reasoning_opened_by_the_template_is_removed_from_its_start():
    text = "Q<think>because</think>A<think>x</think>B"
    assert without_reasoning(text, [(8, len(text))]) == [(23, 24), (40, 41)]
    assert without_reasoning("plain", [(0, 5)]) == [(0, 5)]


def test_the_r1_template_keeps_the_reasoning_and_marks_it():
    text = (REPOSITORY / "templates/chat/deepseek-r1.jinja").read_text()
    template = ChatTemplate(text, {"bos_token": "<b>", "eos_token": "<e>"})
    turns = [{"role": "user", "content": "6 x 7?"}, {"role": "assistant", "content": REASONING}]
    rendered, ((start, end),) = template.render(turns, "a.jsonl:1")
    assert rendered == f"<b><｜User｜>6 x 7?<｜Assistant｜>{REASONING}<e>"
    assert rendered[start:end] == f"{REASONING}<e>"


def test_reasoning_without_an_end_is_removed_to_the_end_of_the_turn():
    assert without_reasoning("Q yes<think>but then", [(2, 20)]) == [(2, 5)]
    assert without_reasoning("<think>a</think>b<think>c", [(0, 25)]) == [(16, 17)]


def test_any_error_of_a_template_is_reported_with_the_location():
    endless = ChatTemplate("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {"eos_token": "<e>"})
    for template in (endless, ChatTemplate("{{ 1 // 0 }}", {"eos_token": "<e>"})):
        with pytest.raises(UserError, match=r"a.jsonl:7: the chat template refuses this conversation: \w+Error"):
            template.render([{"role": "user", "content": "Q"}], "a.jsonl:7")


def test_a_conversation_that_the_template_refuses_is_reported(tmp_path: Path, tokenizer_folder: Path):
    chats = [conversation(0), conversation(1), conversation(2)]
    corpus = write_jsonl(tmp_path / "a.jsonl", "messages", chats)
    template = ChatTemplate("{{ raise_exception('not with me') }}", {"eos_token": "<|endoftext|>"})
    with pytest.raises(UserError, match="here: the chat template refuses this conversation: not with me"):
        template.render(chats[0], "here")
    assert make_shards(tmp_path, tokenizer_folder, [corpus], dataset("chat")).skipped == {}
