"""Renders a chat template through transformers, with a fixed date and without random choices; data/tokenizers/chat_template.py
calls it.

In a module of its own, because compat/transformers.py imports torch, which encoding does without.
"""

from __future__ import annotations

from datetime import date
from typing import Any, NoReturn

FIXED_DATE = date(2024, 7, 26)
"""The date that `strftime_now` shows. Llama 3's templates show this date where there is no clock."""


def render_chat(
    template: str,
    messages: list[Any],
    tools: list[Any] | None,
    add_generation_prompt: bool,
    special_tokens: dict[str, str],
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation, and the spans between generation markers.

    Equal arguments give equal text, on every day: the hash of a dataset must tell its tokens.

    Written for transformers 5.23. Its render function passes no function on to a template, so the clock can only be replaced in
    the compiled template, which an internal function returns from its cache.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    _make_deterministic(_compile_jinja_template(template))
    variables: dict[str, Any] = special_tokens
    rendered: Any = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    (text,), (spans,) = rendered
    return text, spans


def _make_deterministic(compiled: Any) -> None:
    compiled.globals["strftime_now"] = FIXED_DATE.strftime
    compiled.globals["lipsum"] = _refuse_random
    compiled.environment.filters["random"] = _refuse_random


def _refuse_random(*_arguments: Any, **_options: Any) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError("it makes a random choice, so the same data would give other tokens each time")
