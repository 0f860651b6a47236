"""Renders a chat template through transformers, with a fixed date and without random choices; data/tokenizers/chat_template.py
calls it. Written for transformers 5.23.

In a module of its own, because compat/transformers.py imports torch, which encoding does without.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sized
from datetime import date
from functools import cache, partial
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

    Equal arguments give equal text, on every day: the hash of a dataset must identify its tokens.

    transformers' render function passes no function on to a template, so the clock can only be replaced in
    the compiled template, which an internal function returns from its cache.
    """
    from jinja2.filters import FILTERS
    from jinja2.sandbox import SandboxedEnvironment
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    SandboxedEnvironment.intercepted_binops = frozenset(_BOUNDED)  # read while a template is compiled
    for name in ("center", "format", "indent"):  # constants are filtered while a template is compiled
        FILTERS[name] = _bounded_filter(name)
    compiled = _compile_jinja_template(template)
    compiled.environment.binop_table.update(_BOUNDED)  # pyright: ignore[reportAttributeAccessIssue]
    compiled.environment.call = partial(_bounded_call, compiled.environment)  # pyright: ignore[reportAttributeAccessIssue]
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


def _bounded_power(base: Any, exponent: Any) -> Any:
    """Return base ** exponent. No time limit ends one operation of Python, and a large power takes hours."""
    if abs(exponent) * math.log2(abs(base) + 2) > _MOST_BITS:
        raise OverflowError("the power is too large")
    return base**exponent


def _bounded_product(one: Any, other: Any) -> Any:
    """Return one * other. The product of a text or a list and a number would fill the memory."""
    for repeated, count in ((one, other), (other, one)):
        if isinstance(repeated, Sized) and isinstance(count, int) and len(repeated) * count > _MOST_ITEMS:
            raise OverflowError("the product is too long")
    return one * other


def _bounded_remainder(one: Any, other: Any) -> Any:
    """Return one % other, which formats a text."""
    if isinstance(one, str):
        _refuse_wide("format", one, other if isinstance(other, tuple) else (other,))
    return one % other


def _bounded_call(environment: Any, context: Any, function: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function like the sandbox. Methods of a text may pad it to any width."""
    method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
    text = getattr(method, "__self__", None)
    if isinstance(text, str):
        _refuse_wide(method.__name__, text, (*arguments, *options.values()))
    return type(environment).call(environment, context, function, *arguments, **options)


@cache
def _bounded_filter(name: str) -> Callable[..., Any]:
    from jinja2.filters import FILTERS

    unbounded = FILTERS[name]

    def bounded(value: Any, *arguments: Any, **options: Any) -> Any:
        _refuse_wide(name, str(value), (*arguments, *options.values()))
        return unbounded(value, *arguments, **options)

    return bounded


def _refuse_wide(name: str, text: str, arguments: tuple[Any, ...]) -> None:
    """Raise OverflowError if a filter or a method of a text, with these arguments, would fill the memory."""
    widths = [argument for argument in arguments if isinstance(argument, int)]
    if name in ("format", "format_map"):
        takes_widths = "*" in text or _NESTED_FIELD.search(text)
        widths = [*(widths if takes_widths else []), *map(int, _LARGE_WIDTH.findall(text))]
    factor = len(text) if name in ("expandtabs", "indent") else 1
    if name in _WIDENING and any(width * factor > _MOST_ITEMS for width in widths):
        raise OverflowError(f"the text of {name} is too long")


def _refuse_address(text: str, given: str) -> None:
    """Raise TemplateError if a text shows an object's address in memory, which is another one in each process."""
    from jinja2 import TemplateError

    if any(address not in given for address in _ADDRESS.findall(text)):
        raise TemplateError("it writes an object's address, so the same data would give other tokens each time")


_WIDENING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "indent"})
_LARGE_WIDTH = re.compile(r"(?:%(?:\([^)]*\))?[-#0 +.0-9]*?|\{[^{}]*:[^{}]*?)([0-9]{8,18})")
"""The width or precision in "%20000000d", "%(name).20000000f" or "{:>20000000}", but not the number in "%s on 20240726"."""
_NESTED_FIELD, _ADDRESS = re.compile(r":[^}]*{"), re.compile(r" at 0x[0-9a-f]+>")
_MOST_BITS, _MOST_ITEMS = 10_000, 10_000_000
_BOUNDED: dict[str, Callable[[Any, Any], Any]] = {"**": _bounded_power, "*": _bounded_product, "%": _bounded_remainder}


def _make_deterministic(compiled: Any) -> None:
    compiled.globals["strftime_now"] = FIXED_DATE.strftime
    compiled.globals["lipsum"] = _refuse_random
    compiled.environment.filters["random"] = _refuse_random


def _refuse_random(*_arguments: Any, **_options: Any) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError("it makes a random choice, so the same data would give other tokens each time")
