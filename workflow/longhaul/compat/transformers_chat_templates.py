"""Renders a chat template through transformers, with a fixed date and without random choices; data/tokenizers/chat_template.py
calls it. Written for transformers 5.23.

In a module of its own, because compat/transformers.py imports torch, which encoding does without.
"""

from __future__ import annotations

import re
from datetime import date
from typing import Any, NoReturn

from longhaul.compat.jinja_sandbox import BOUNDED

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

    Equal arguments give equal text, on every day: the hash of a dataset must identify its tokens. The caller limits time and
    memory; here are bounds of what takes hours in one operation.

    transformers' render function passes no function on to a template, so the clock can only be replaced in
    the compiled template, which an internal function returns from its cache.
    """
    from jinja2.sandbox import SandboxedEnvironment
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    SandboxedEnvironment.intercepted_binops = frozenset(BOUNDED)  # read while a template is compiled
    compiled = _compile_jinja_template(template)
    compiled.environment.binop_table.update(BOUNDED)  # pyright: ignore[reportAttributeAccessIssue]
    _make_deterministic(compiled)
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
    _refuse_address(text, f"{template} {messages} {tools}")
    return text, spans


def _refuse_address(text: str, given: str) -> None:
    """Raise TemplateError if a text shows an object's address in memory, which is another one in each process."""
    from jinja2 import TemplateError

    if any(address not in given for address in _ADDRESS.findall(text)):
        raise TemplateError("it writes an object's address, so the same data would give other tokens each time")


_ADDRESS = re.compile(r" at 0x[0-9a-f]+>")


def _make_deterministic(compiled: Any) -> None:
    compiled.globals["strftime_now"] = FIXED_DATE.strftime
    compiled.globals["lipsum"] = _refuse_random
    compiled.environment.filters["random"] = _refuse_random


def _refuse_random(*_arguments: Any, **_options: Any) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError("it makes a random choice, so the same data would give other tokens each time")
