"""Equal conversations give equal text on any day: templates have a fixed clock and no random choices."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from longhaul.compat.transformers_chat_templates import render_chat
from longhaul.data.tokenizers.chat_template import ChatTemplate
from longhaul.errors import UserError

QUESTION: list[Any] = [{"role": "user", "content": "Q"}]
LLAMA_3_DATE = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
    "{%- endif %}{%- endif %}Today Date: {{ date_string }} {{ messages[0].content }}"
)


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 1, 2)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    chat_template_utils._compile_jinja_template.cache_clear()


def render(template: str) -> str:
    return render_chat(template, QUESTION, None, False, {})[0]


def test_the_clock_of_a_template_stands_still(tomorrow: None):
    assert render(LLAMA_3_DATE) == "Today Date: 26 Jul 2024 Q"
    assert render(LLAMA_3_DATE) == "Today Date: 26 Jul 2024 Q", "the template is cached now"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ['a', 'b'] | random }}",
        "{{ [['a', 'b']] | map('random') | list }}",
        "{% set f = 'ran' ~ 'dom' %}{{ [['a', 'b']] | map(f) | list }}",
        "{{ lipsum() }}",
    ],
)
def test_random_choices_are_refused(template: str):
    with pytest.raises(TemplateError, match="it makes a random choice"):
        render(template)
    with pytest.raises(UserError, match=r"a\.jsonl:7: the chat template refuses .*it makes a random choice"):
        ChatTemplate(template, {"eos_token": "<e>"}).render(QUESTION, "a.jsonl:7")


def test_other_templates_render_as_in_transformers():
    template = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{% endfor %}{{ bos_token }}"
    assert render_chat(template, QUESTION, None, False, {"bos_token": "<b>"}) == ("USER: Q<b>", [])


def test_transformers_still_has_no_other_way_to_set_the_clock(tomorrow: None):
    """Else the private function is no longer needed."""
    with pytest.raises(TypeError, match="not callable"):
        chat_template_utils.render_jinja_template(
            [QUESTION], chat_template=LLAMA_3_DATE, strftime_now=lambda _format: "fixed"
        )
