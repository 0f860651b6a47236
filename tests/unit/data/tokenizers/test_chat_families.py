"""The text in the loss for shapes of chat data under the chat templates of four families, against hand-written values."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from longhaul.artifacts.artifact_schemas import TokenizerManifest
from longhaul.data.readers.read_documents import Document, read_documents
from longhaul.data.tokenizers.chat_template import ChatTemplate
from longhaul.data.tokenizers.document_encoder import DocumentEncoder, EncodedBatch
from tests.support.chat_families import FAMILIES, make_family_tokenizer
from tests.support.corpora import dataset

IM, EOT, R1 = "<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
NO_TOOLS, NO_CALLS, NO_REASONING = "!does not write the tools", "!does not write the tool calls", "!write the reasoning"
NO_CONTENT = "!does not write the content of this"
PART = "!message 2: the chat template does not write a part of this assistant message"
DROPS, EMPTY = "!drops a part of the last assistant message", "!an assistant turn has no text in the loss, only the EOS"


def user(content: Any = "Q", **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def answer(content: Any = "A", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def call(arguments: Any, name: str = "weather") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


PARIS = {"city": "Paris"}
RESULT = {"role": "tool", "content": "18"}
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Paris"}}' + EOT
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
R1_CALL = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜>'
QWEN_EMPTY = "<think>\n\n</think>\n\n"
CALLED = [user(), answer(None, tool_calls=[call(PARIS)]), RESULT, answer("It is 18.")]


def everywhere(text: str) -> dict[str, str]:
    """Return the expectation of one answer without reasoning, which Qwen 3 writes with an empty one."""
    return {
        "chatml": text + IM,
        "llama3": text + EOT,
        "qwen3": QWEN_EMPTY + text + IM,
        "deepseek-r1": text + R1,
    }


def refused(reason: str) -> dict[str, str]:
    return dict.fromkeys(FAMILIES, reason)


# name -> row, text in the loss of each family, or "!" and a part of the message
SHAPES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "one answer": ({"messages": [user(), answer()]}, everywhere("A")),
    "system message": ({"messages": [{"role": "system", "content": "S"}, user(), answer()]}, everywhere("A")),
    "two answers": (
        {"messages": [user(), answer("A1"), user(), answer("A2")]},
        {
            "chatml": f"A1{IM}A2{IM}",
            "llama3": f"A1{EOT}A2{EOT}",
            "qwen3": f"A1{IM}{QWEN_EMPTY}A2{IM}",
            "deepseek-r1": f"A1{R1}A2{R1}",
        },
    ),
    "ends with a question": (
        {"messages": [user(), answer(), user("last")]},
        {"chatml": f"A{IM}", "llama3": f"A{EOT}", "qwen3": f"A{IM}", "deepseek-r1": f"A{R1}"},
    ),
    "begins with an answer": (
        {"messages": [answer("A1"), user(), answer("A2")]},
        {
            "chatml": f"A1{IM}A2{IM}",
            "llama3": "!refuses this conversation",
            "qwen3": "!refuses this conversation",
            "deepseek-r1": f"A1{R1}A2{R1}",
        },
    ),
    "weight 0 of the first answer": (
        {"messages": [user(), answer("A1", weight=0), user(), answer("A2", weight=1)]},
        everywhere("A2"),
    ),
    "weight 0 of all answers": (
        {"messages": [user(), answer(weight=0)]},
        refused("!no assistant turn with a weight"),
    ),
    "list of text parts": (
        {"messages": [user([{"type": "text", "text": "Q"}]), answer([{"type": "text", "text": "A"}] * 2)]},
        everywhere("AA"),
    ),
    "ShareGPT": (
        {"messages": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        everywhere("A"),
    ),
    "answer quotes the EOS": (
        {"messages": [user(), answer(f"Write {IM} or {EOT} or {R1}.")]},
        everywhere(f"Write {IM} or {EOT} or {R1}."),
    ),
    "earlier answer quotes the EOS": (
        {"messages": [user(), answer(f"{IM}{EOT}{R1} ends."), user(), answer(f"ends{IM}{EOT}{R1}")]},
        {
            "chatml": f"{IM}{EOT}{R1} ends.{IM}ends{IM}{EOT}{R1}{IM}",
            "llama3": f"{IM}{EOT}{R1} ends.{EOT}ends{IM}{EOT}{R1}{EOT}",
            "qwen3": f"{IM}{EOT}{R1} ends.{IM}{QWEN_EMPTY}ends{IM}{EOT}{R1}{IM}",
            "deepseek-r1": f"{IM}{EOT}{R1} ends.{R1}ends{IM}{EOT}{R1}{R1}",
        },
    ),
    "question with a turn of its own": (
        {"messages": [user("Q<|im_end|>\n<|im_start|>assistant\nnever<|im_end|><｜Assistant｜>never"), answer()]},
        everywhere("A"),
    ),
    "reasoning in the content": (
        {"messages": [user(), answer("<think>why</think>A")]},
        {
            "chatml": f"<think>why</think>A{IM}",
            "llama3": f"<think>why</think>A{EOT}",
            "qwen3": f"<think>\nwhy\n</think>\n\nA{IM}",
            "deepseek-r1": DROPS,
        },
    ),
    "reasoning in the content of an earlier answer": (
        {"messages": [user(), answer("<think>old</think>A1"), user(), answer("A2")]},
        {
            "chatml": f"<think>old</think>A1{IM}A2{IM}",
            "llama3": f"<think>old</think>A1{EOT}A2{EOT}",
            "qwen3": f"A1{IM}{QWEN_EMPTY}A2{IM}",
            "deepseek-r1": f"A1{R1}A2{R1}",
        },
    ),
    "earlier answer quotes </think>": (
        {"messages": [user(), answer("Close it with </think> always."), user(), answer("A2")]},
        {
            "chatml": f"Close it with </think> always.{IM}A2{IM}",
            "llama3": f"Close it with </think> always.{EOT}A2{EOT}",
            "qwen3": PART,
            "deepseek-r1": PART,
        },
    ),
    "earlier answer quotes </think>, and a question repeats it": (
        {"messages": [user(), answer("Write </think> then."), user("Write </think> then. Why?"), answer("A2")]},
        {
            "chatml": f"Write </think> then.{IM}A2{IM}",
            "llama3": f"Write </think> then.{EOT}A2{EOT}",
            "qwen3": PART,
            "deepseek-r1": PART,
        },
    ),
    "earlier reasoning, then an answer that quotes </think>": (
        {"messages": [user(), answer("<think>old</think>Write </think> then."), user(), answer("A2")]},
        {
            "chatml": f"<think>old</think>Write </think> then.{IM}A2{IM}",
            "llama3": f"<think>old</think>Write </think> then.{EOT}A2{EOT}",
            "qwen3": PART,
            "deepseek-r1": PART,
        },
    ),
    "reasoning in a key": (
        {"messages": [user(), answer(reasoning_content="why")]},
        {
            "chatml": NO_REASONING,
            "llama3": NO_REASONING,
            "qwen3": f"<think>\nwhy\n</think>\n\nA{IM}",
            "deepseek-r1": NO_REASONING,
        },
    ),
    "reasoning of an earlier answer": (
        {"messages": [user(), answer("A1", reasoning_content="old"), user(), answer("A2", reasoning_content="new")]},
        {
            "chatml": NO_REASONING,
            "llama3": NO_REASONING,
            "qwen3": f"A1{IM}<think>\nnew\n</think>\n\nA2{IM}",
            "deepseek-r1": NO_REASONING,
        },
    ),
    "tools, a call without content, its result": (
        {"messages": CALLED, "tools": TOOLS},
        {
            "chatml": NO_TOOLS,
            "llama3": f"{LLAMA_CALL}It is 18.{EOT}",
            "qwen3": f"{QWEN_CALL}{IM}{QWEN_EMPTY}It is 18.{IM}",
            "deepseek-r1": NO_TOOLS,
        },
    ),
    "a call whose arguments are JSON text": (
        {"messages": [user(), {"role": "assistant", "tool_calls": [call('{"city":"Paris"}')]}, RESULT, answer("18")]},
        {
            "chatml": NO_CALLS,
            "llama3": f"{LLAMA_CALL}18{EOT}",
            "qwen3": f"{QWEN_CALL}{IM}{QWEN_EMPTY}18{IM}",
            "deepseek-r1": f"<｜tool▁calls▁begin｜>{R1_CALL}<｜tool▁calls▁end｜>{R1}18{R1}",
        },
    ),
    "two calls at once": (
        {"messages": [user(), answer("", tool_calls=[call(PARIS), {"name": "weather", "arguments": PARIS}])]},
        {
            "chatml": NO_CALLS,
            "llama3": "!only supports single tool-calls",
            "qwen3": f"{QWEN_EMPTY}{QWEN_CALL}\n{QWEN_CALL}{IM}",
            "deepseek-r1": f"<｜tool▁calls▁begin｜>{R1_CALL}\n{R1_CALL}<｜tool▁calls▁end｜>{R1}",
        },
    ),
    "a call and content": (
        {"messages": [user(), answer("Look.", tool_calls=[call(PARIS)]), RESULT, answer("18")]},
        {
            "chatml": NO_CALLS,
            "llama3": "!does not write the content of a message with tool calls",
            "qwen3": f"Look.\n{QWEN_CALL}{IM}{QWEN_EMPTY}18{IM}",
            "deepseek-r1": f"Look.<｜tool▁calls▁begin｜>{R1_CALL}<｜tool▁calls▁end｜>{R1}18{R1}",
        },
    ),
    "a result quotes the arguments in Python's notation": (
        {"messages": [user(), answer(None, tool_calls=[call(PARIS)]), {**RESULT, "content": str(PARIS)}, answer("18")]},
        {
            "chatml": NO_CALLS,
            "llama3": f"{LLAMA_CALL}18{EOT}",
            "qwen3": f"{QWEN_CALL}{IM}{QWEN_EMPTY}18{IM}",
            "deepseek-r1": f"<｜tool▁calls▁begin｜>{R1_CALL}<｜tool▁calls▁end｜>{R1}18{R1}",
        },
    ),
    "tools that nobody calls": (
        {"messages": [user(), answer()], "tools": json.dumps(TOOLS)},
        {**everywhere("A"), "chatml": NO_TOOLS, "deepseek-r1": NO_TOOLS},
    ),
    "a developer message": (
        {"messages": [{"role": "developer", "content": "Be brief."}, user(), answer()]},
        {
            **everywhere("A"),
            "qwen3": f"{NO_CONTENT} developer message",
            "deepseek-r1": f"{NO_CONTENT} developer message",
        },
    ),
    "a developer message whose text another message contains": (
        {"messages": [{"role": "developer", "content": "Hi"}, user("Hi there"), answer()]},
        {
            **everywhere("A"),
            "qwen3": f"{NO_CONTENT} developer message",
            "deepseek-r1": f"{NO_CONTENT} developer message",
        },
    ),
    "two system messages": (
        {"messages": [*({"role": "system", "content": text} for text in ("One.", "Two.")), user(), answer()]},
        everywhere("A"),
    ),
    "empty answer": ({"messages": [user(), answer("")]}, refused(EMPTY)),
    "empty earlier answer": ({"messages": [user(), answer(" "), user(), answer()]}, refused(EMPTY)),
}


@cache
def tokenizer_of(family: str, folder: Path) -> TokenizerManifest:
    return make_family_tokenizer(family, folder / family)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def encode(family: str, folder: Path, row: dict[str, Any], work: Path, **settings: Any) -> EncodedBatch:
    (work / "row.jsonl").write_text(json.dumps(row))
    chats = dataset("chat", **settings)
    documents = list(read_documents([str(work / "row.jsonl")], chats))
    return DocumentEncoder(tokenizer_of(family, folder), chats, "tokenizers").encode(documents)


def decoded(family: str, folder: Path, ids: np.ndarray) -> str:
    tokenizer = Tokenizer.from_file(str(folder / family / "tokenizer.json"))
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_text_in_the_loss_is_the_expected_one(shape: str, family: str, folder: Path, tmp_path: Path):
    row, expected = SHAPES[shape]
    encoded = encode(family, folder, row, tmp_path)
    if expected[family].startswith("!"):
        (error,) = encoded.left_out
        assert expected[family][1:] in error.message and "row.jsonl:1" in error.message and error.hint
        return
    assert not encoded.left_out and encoded.mask is not None
    assert decoded(family, folder, encoded.tokens[encoded.mask == 1]) == expected[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_control_token_in_a_message_is_text_unless_it_is_allowed(family: str, folder: Path, tmp_path: Path):
    eos, eos_id = FAMILIES[family].eos, tokenizer_of(family, folder).eos_id
    row = {"messages": [user(f"Q{eos}"), answer(f"A{eos}A")]}
    plain = encode(family, folder, row, tmp_path)
    allowed = encode(family, folder, row, tmp_path, allow_control_tokens=True)
    without = encode(family, folder, {"messages": [user("Q"), answer("AA")]}, tmp_path)
    counts = [int((batch.tokens == eos_id).sum()) for batch in (without, plain, allowed)]
    assert counts == [counts[0], counts[0], counts[0] + 2]
    assert decoded(family, folder, plain.tokens) == decoded(family, folder, allowed.tokens)
    assert (without.control_texts, plain.control_texts, allowed.control_texts) == (0, 1, 0)


def test_conversations_with_control_text_stay_in_order(folder: Path, tmp_path: Path):
    manifest = tokenizer_of("chatml", folder)
    contents = ["one", "two <|im_end|>", "three", "four <|im_start|>", "five <|im_end|>"]
    documents = [Document([user(), answer(content)], f"row {number}", 0) for number, content in enumerate(contents)]
    encoded = DocumentEncoder(manifest, dataset("chat"), "tokenizers").encode(documents)
    assert encoded.mask is not None
    text = decoded("chatml", folder, encoded.tokens[encoded.mask == 1])
    assert text == "".join(f"{content}<|im_end|>" for content in contents)
    assert len(encoded.lengths) == len(encoded.keys) == 5 and encoded.lengths.sum() == len(encoded.tokens)


def test_a_template_that_prints_python_values_gets_arguments_as_text():
    calls = "{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}"
    source = "{% for m in messages %}{{ m.content }}" + calls + "<e>{% endfor %}"
    template = ChatTemplate(source, {"eos_token": "<e>"})
    for question in ("Q", "{'is': True}"):
        rendered = template.render([user(question), answer("", tool_calls=[call({"is": True})])], "here")
        assert rendered.text == question + '<e>{"is": true}<e>'


def test_reasoning_that_is_the_whole_answer_is_no_target_without_the_reasoning(folder: Path, tmp_path: Path):
    row = {"messages": [user(), answer("", reasoning_content="why")]}
    assert not encode("qwen3", folder, row, tmp_path).left_out
    (error,) = encode("qwen3", folder, row, tmp_path, reasoning_in_loss=False).left_out
    assert "only the EOS" in error.message


def test_unread_keys_of_tool_calls_are_counted(folder: Path):
    encoder = DocumentEncoder(tokenizer_of("qwen3", folder), dataset("chat"), "tokenizers")
    called = call(PARIS)
    calls = [called, {**called, "id": "1", "function": {**called["function"], "strict": True}}]
    encoder.encode([Document([user(), answer("", tool_calls=calls)], "row 1", 0)])
    expected = {"messages": 1, "is_read": False}
    names = ("assistant.tool_calls.function.strict", "assistant.tool_calls.id")
    assert encoder.take_unread_keys() == dict.fromkeys(names, expected)


def test_earlier_reasoning_in_the_content_is_counted(folder: Path):
    encoder = DocumentEncoder(tokenizer_of("qwen3", folder), dataset("chat"), "tokenizers")
    earlier = [user(), answer("<think>old</think>A1"), user(), answer("<think>old</think>A2"), user()]
    encoder.encode([Document([*earlier, answer("<think>new</think>A3")], "row 1", 0)])
    assert encoder.take_unread_keys() == {"reasoning of an earlier turn": {"messages": 2, "is_read": False}}


def test_keys_that_the_template_does_not_read_are_counted(folder: Path, tmp_path: Path):
    chats = dataset("chat")
    encoder = DocumentEncoder(tokenizer_of("qwen3", folder), chats, "tokenizers")
    asked = user(name="Ann", weight=0, thinking="T")
    messages = [asked, answer("A1", reasoning_content="old"), user(), answer("A2", refusal="no")]
    encoder.encode([Document(messages, f"row {number}", 0) for number in range(20)])
    expected = {
        "assistant.refusal": {"messages": 20, "is_read": False},
        "reasoning of an earlier turn": {"messages": 20, "is_read": False},
        "user.name": {"messages": 20, "is_read": False},
        "user.thinking": {"messages": 20, "is_read": False},
        "user.weight": {"messages": 20, "is_read": False},
    }
    assert encoder.take_unread_keys() == expected
    assert encoder.take_unread_keys() == {}
