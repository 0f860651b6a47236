"""Chat templates mark the assistant's spans, and their errors have a location."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.data.tokenizers.chat_template import ChatTemplate, Rendered, without_reasoning
from longhaul.data.tokenizers.control_tokens import ControlTokens
from longhaul.errors import UserError
from tests.support.corpora import conversation, dataset, make_shards, write_jsonl
from tests.support.pipeline_run import REPOSITORY
from tests.support.remedies_in_source import record_places, remedies_in_source

THINK = ("<think>", "</think>")
REASONING = "<think>First 40, then 2.</think>It is 42."


TOOLS = [{"type": "function", "function": {"name": "weather"}}]
EOS = {"eos_token": "<e>"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}


def _in_loss(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for turn in rendered.turns for start, end in turn]


def _shipped(name: str) -> ChatTemplate:
    text = (REPOSITORY / f"templates/chat/{name}.jinja").read_text()
    return ChatTemplate(text, {"bos_token": "<b>", "eos_token": "<e>"})


def test_longhauls_templates_write_the_reasoning():
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "why"}]
    for name in ("chatml", "deepseek-r1"):
        assert _in_loss(_shipped(name).render(turns, "here")) == ["<think>\nwhy\n</think>\n\nA<e>"]


def test_longhauls_chatml_writes_tools_and_calls():
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, call]
    rendered = _shipped("chatml").render(turns, "here", TOOLS)
    assert rendered.text.startswith('<|im_start|>system\nS\n\nYou may call these functions:\n<tools>\n{"type"')
    assert rendered.text.count("<|im_start|>system") == 1
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><e>'
    assert _in_loss(rendered) == [written]


def test_a_weight_of_0_selects_marked_turns_by_their_messages():
    """The template marks two spans in each turn."""
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}|"
        "{% generation %}<e>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    turns = [conversation(number)[index] for number in range(2) for index in (1, 2)]
    turns[0]["content"] = turns[2]["content"] = "Q"
    turns[1] |= {"content": "A", "weight": 0}
    turns[3]["content"] = "A"
    rendered = ChatTemplate(source, {"eos_token": "<e>"}).render(turns, "here")
    assert rendered.text == "QA|<e>QA|<e>" and rendered.turns == [[(7, 8), (9, 12)]]


def test_an_earlier_turn_without_eos_is_refused():
    """The first EOS after that turn ends the user's next message."""
    source = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}"
        "{% if m.role == 'user' or loop.last %}<e>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = [{"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"))] * 2
    with pytest.raises(UserError, match="here: cannot find the assistant's tokens"):
        ChatTemplate(source, {"eos_token": "<e>"}).render(turns, "here")


def test_reasoning_opened_by_the_template_is_removed_from_its_start():
    text = "Q<think>because</think>A<think>x</think>B"
    assert without_reasoning(text, [(8, len(text))], THINK) == [(23, 24), (40, 41)]
    assert without_reasoning("plain", [(0, 5)], THINK) == [(0, 5)]


def test_the_r1_template_keeps_the_reasoning_and_marks_it():
    text = (REPOSITORY / "templates/chat/deepseek-r1.jinja").read_text()
    template = ChatTemplate(text, {"bos_token": "<b>", "eos_token": "<e>"})
    turns = [{"role": "user", "content": "6 x 7?"}, {"role": "assistant", "content": REASONING}]
    rendered = template.render(turns, "a.jsonl:1")
    assert rendered.text == f"<b><｜User｜>6 x 7?<｜Assistant｜>{REASONING}<e>"
    assert _in_loss(rendered) == [f"{REASONING}<e>"]


def test_reasoning_without_an_end_is_removed_to_the_end_of_the_turn():
    assert without_reasoning("Q yes<think>but then", [(2, 20)], THINK) == [(2, 5)]
    assert without_reasoning("<think>a</think>b<think>c", [(0, 25)], THINK) == [(16, 17)]


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


def test_an_endless_template_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("longhaul.data.tokenizers.chat_template.RENDER_LIMIT_S", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=r"here: the chat template refuses .* no end within 0.2 s of CPU time"):
        ChatTemplate(endless, {"eos_token": "<e>"}).render([{"role": "assistant", "content": "A"}], "here")


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("9 ** (9 ** 9)", "the power is too large"),
        ("2.0 ** (10 ** 9)", "the power is too large"),
        ("10 ** 2000 * 10 ** 2000", "the product is too large"),
    ],
)
def test_an_operation_that_does_not_end_is_refused(expression: str, error: str):
    """No signal ends it: Python computes it in one instruction."""
    with pytest.raises(UserError, match=f"here: the chat template refuses this conversation: OverflowError: {error}"):
        ChatTemplate(f"{{{{ {expression} }}}}", {"eos_token": "<e>"}).render([{"role": "user", "content": "Q"}], "here")


TWICE = "{% set ns = namespace(x=START) %}{% for i in range(40) %}{% set ns.x = ns.x PLUS ns.x %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** 10 * [0] }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '%*d' | format(1500000000, 1) }}",
        "{{ '{:>{}}'.format(1, 10 ** 10) }}",
        "{{ ('a' * 10 ** 4).replace('', 'b' * 10 ** 6) }}",
        "{{ ('a' * 10 ** 4) | replace('', 'b' * 10 ** 6) }}",
        "{{ ','.join(['a' * 10 ** 6] * 10 ** 5) }}",
        "{{ (['a' * 10 ** 6] * 10 ** 5) | join }}",
        "{% for text in ['a' * 10 ** 7] * 1000 %}{{ text }}{% endfor %}",
        "{{ ('{0}' * 10 ** 5).format('a' * 10 ** 6) }}",
        "{{ ('a\n' * 10 ** 5) | indent('b' * 10 ** 6) }}",
        "{{ ('a ' * 10 ** 5) | wordwrap(1, wrapstring='b' * 10 ** 6) }}",
        "{{ [1] | batch(10 ** 10, 0) | list }}",
        TWICE.replace("START", "'a'").replace("PLUS", "~"),
        TWICE.replace("START", "[1]").replace("PLUS", "+"),
    ],
)
def test_a_template_that_fills_the_memory_is_refused(template: str):
    with pytest.raises(UserError, match=r"here: the chat template refuses .* it needs more than 1 GB of memory"):
        ChatTemplate(template, {"eos_token": "<e>"}).render([{"role": "user", "content": "Q"}], "here")


def test_an_address_in_memory_is_refused_unless_the_conversation_has_it():
    template = ChatTemplate("{{ messages[0].content }}{{ messages[0].items if messages[0].content == 'Q' }}", {})
    with pytest.raises(UserError, match="it writes an object's address"):
        template.render([{"role": "user", "content": "Q"}], "here")
    text = "<object at 0x7f00>"
    assert template.render([{"role": "user", "content": text}], "here").text == text


_TURNS = [{"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"))]
_PLAIN = "{% for m in messages %}{{ m.content }}<e>{% endfor %}"
_REFUSES_A = "{% if messages[0].content == 'A' %}{{ raise_exception('begin with Q') }}{% endif %}"
_WITHOUT_END = _PLAIN.replace("<e>", "|")
_AS_OBJECT = (
    "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments }}{{ c.function.arguments.city[0] }}"
)
_AS_OBJECT += "{% endfor %}{{ m.content }}<e>{% endfor %}"
_MARKS_LAST = "{% for m in messages %}{% if m.role == 'assistant' or loop.last %}{% generation %}{{ m.content }}<e>"
_MARKS_LAST += "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
_CONTROL = ControlTokens(["<c>"])
_WEIGHTED = [*_TURNS[:1], {**_TURNS[1], "weight": 0}, *_TURNS, *_TURNS[:1]]
_PRIVATE = [{"role": "user", "content": "<c>\U00100000"}, _TURNS[1]]
_SHIPPED = (REPOSITORY / "templates/chat/chatml.jinja").read_text()
REMEDIES: dict[str, tuple[ChatTemplate, list[Any], ChatTemplate, list[Any]]] = {
    "remove the private characters": (
        *(ChatTemplate(_PLAIN, EOS, _CONTROL), _PRIVATE),
        *(ChatTemplate(_SHIPPED, EOS, _CONTROL), [{"role": "user", "content": "<c>"}, _TURNS[1]]),
    ),
    "give a template with {% generation %} markers": (
        *(ChatTemplate(_AS_OBJECT, EOS), [_TURNS[0], {**_TURNS[1], "tool_calls": [CALL]}]),
        *(ChatTemplate(_SHIPPED, EOS), [_TURNS[0], {**_TURNS[1], "tool_calls": [CALL]}]),
    ),
    "fix the conversation": (
        *(ChatTemplate(_REFUSES_A + _PLAIN, EOS), [_TURNS[1], *_TURNS]),
        *(ChatTemplate(_REFUSES_A + _PLAIN, EOS), _TURNS),
    ),
    "or give a template with {% generation %} markers": (
        *(ChatTemplate(_REFUSES_A + _PLAIN, EOS), [_TURNS[1], *_TURNS]),
        *(ChatTemplate(_SHIPPED, EOS), [_TURNS[1], *_TURNS]),
    ),
    "set no message's weight to 0": (
        *(ChatTemplate(_MARKS_LAST, EOS), _WEIGHTED),
        *(ChatTemplate(_MARKS_LAST, EOS), [*_TURNS, *_TURNS, _TURNS[0]]),
    ),
    "or use another chat template": (
        *(ChatTemplate(_MARKS_LAST, EOS), _WEIGHTED),
        *(ChatTemplate(_SHIPPED, EOS), _WEIGHTED),
    ),
    "give a template with {% generation %} markers as tokenizer.chat_template": (
        *(ChatTemplate("{{ messages | length }}" + _PLAIN, EOS), _TURNS),
        *(ChatTemplate(_SHIPPED, EOS), _TURNS),
    ),
    f"({REPOSITORY}/templates/chat has some)": (
        *(ChatTemplate(_PLAIN.replace("m.content", "m.content[1:]"), EOS), _TURNS),
        *(ChatTemplate(_SHIPPED, EOS), _TURNS),
    ),
    f"({REPOSITORY}/templates/chat has some), or": (
        *(ChatTemplate(_WITHOUT_END, EOS), _TURNS),
        *(ChatTemplate(_SHIPPED, EOS), _TURNS),
    ),
    "or set the template's end-of-turn token as eos_token": (
        *(ChatTemplate(_WITHOUT_END, EOS), _TURNS),
        *(ChatTemplate(_WITHOUT_END, {"eos_token": "|"}), _TURNS),
    ),
}
"""Part of the remedy -> a template and a conversation that it refuses, a template and a conversation after the remedy."""


@pytest.mark.parametrize(("says", "case"), REMEDIES.items(), ids=REMEDIES)
def test_after_the_remedy_the_conversation_is_rendered(
    says: str, case: tuple[ChatTemplate, list[Any], ChatTemplate, list[Any]]
):
    template, turns, better, better_turns = case
    with pytest.raises(UserError) as refused:
        template.render(turns, "here")
    assert says in refused.value.hint
    assert better.render(better_turns, "here").turns


def test_every_remedy_of_a_chat_template_is_followed(monkeypatch: pytest.MonkeyPatch):
    places = record_places(monkeypatch)
    for template, turns, *_ in REMEDIES.values():
        with pytest.raises(UserError):
            template.render(turns, "here")
    found = [one for one in remedies_in_source() if one.module == "data/tokenizers/chat_template.py"]
    (unmet,) = [one.text for one in found if not one.is_at(places)]
    assert unmet == "remove that text, or set allow_control_tokens: true"


def test_texts_are_padded_and_formatted():
    template = "{{ 'a' | center(3) }}{{ '1'.zfill(3) }}{{ '%3d' | format(7) }}"
    template += "{{ '%s 20240726' % 1 }}{{ '{}'.format(1700000000) }}{{ 5 % 3 }}"
    found = ChatTemplate(template, {}).render([{"role": "user", "content": "Q"}], "here").text
    assert found == " a 001  71 2024072617000000002"


def test_small_powers_and_products_are_computed():
    template = ChatTemplate("{{ 2 ** 10 }} {{ 'ab' * 2 }} {{ 3 * 4 }} {{ 0.5 ** 2 }}", {"eos_token": "<e>"})
    assert template.render([{"role": "user", "content": "Q"}], "here").text == "1024 abab 12 0.25"
