"""Keeps the text of control tokens in messages, such as "<|im_end|>", plain text when a chat is rendered and encoded.

A message may quote "<|im_end|>". In the rendered conversation the quotation must stay plain text, and must not look like the
end of a turn. Before rendering, `hide` replaces each such text in the data by as many private characters. What the
rendered text then contains of control tokens comes from the template. `exchange` swaps both for the encoder: the tokens of
the template become private characters, which the encoder's special tokens are renamed to, and the data gets its text back.
Nothing changes its length, so spans stay valid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from typing import Any

_PLANE = 0x100000  # Unicode's second plane of private characters
_PRIVATE = re.compile("[\U00100000-\U0010fffd]")
Marks = tuple[str, str]
"""The texts before and behind the reasoning of an answer."""
_THINK: Marks = ("<think>", "</think>")
"""Always tokens: datasets write them into the assistant's messages."""
_BRACKETS: Marks = ("[THINK]", "[/THINK]")
"""Those of Mistral's reasoning models. They are control tokens, and in the content of an answer alone they stay tokens."""


def reasoning_marks(control_tokens: Collection[str]) -> tuple[Marks, ...]:
    """Return the marks of a tokenizer with these control tokens."""
    return (_THINK, _BRACKETS) if set(_BRACKETS).issubset(control_tokens) else (_THINK,)


class ControlTokens:
    """The control tokens of a tokenizer (TokenizerSettings), apart from <think> and </think>."""

    def __init__(self, names: Iterable[str]) -> None:
        tokens = sorted({token for token in names if token and token not in _THINK})
        self.placeholders = {token: chr(_PLANE + number) * len(token) for number, token in enumerate(tokens)}
        self._tokens_of_answers = _BRACKETS if _BRACKETS in reasoning_marks(tokens) else ()

    @cached_property
    def _tokens(self) -> re.Pattern[str]:
        return _any_of(self.placeholders)

    @cached_property
    def _hidden(self) -> re.Pattern[str]:
        return _any_of(self.placeholders.values())

    @cached_property
    def _token_of(self) -> dict[str, str]:
        return {placeholder: token for token, placeholder in self.placeholders.items()}

    def occur_in(self, value: object) -> bool:
        """Return whether a text, or one below a list or a dict, contains the text of a control token."""
        if isinstance(value, str):
            return bool(self.placeholders) and self._tokens.search(value) is not None
        items = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        return any(map(self.occur_in, items))

    def occur_in_answer(self, content: str) -> bool:
        """Return whether an answer contains the text of a control token that is no mark of its reasoning."""
        return any(
            self.occur_in(part) for part in self._parts_of_answer(content) if part not in self._tokens_of_answers
        )

    def hide_in_answer(self, content: str) -> str:
        """Return an answer with private characters in place of control tokens, except the marks of its reasoning."""
        parts = self._parts_of_answer(content)
        return "".join(part if part in self._tokens_of_answers else self.hide(part) for part in parts)

    def _parts_of_answer(self, content: str) -> list[str]:
        """Return an answer in parts; each mark that is a token in answers alone is one of them."""
        if not self._tokens_of_answers:
            return [content]
        return re.split(f"({_any_of(self._tokens_of_answers).pattern})", content)

    def hide(self, value: object) -> Any:
        """Return a value whose texts contain private characters in place of control tokens."""
        return map_texts(value, lambda text: self._tokens.sub(lambda found: self.placeholders[found[0]], text))

    def restore(self, text: str) -> str:
        """Return a text with the control tokens that `hide` replaced."""
        return self._hidden.sub(lambda found: self._token_of[found[0]], text)

    def exchange(self, text: str) -> str:
        """Return a text in which hidden control tokens are text again, and the others are hidden."""
        swapped = self.placeholders | self._token_of
        return re.sub(f"{self._tokens.pattern}|{self._hidden.pattern}", lambda found: swapped[found[0]], text)


def contain_private_characters(value: object) -> bool:
    """Return whether a text below a value contains characters that `hide` uses."""
    found: list[bool] = []
    map_texts(value, lambda text: found.append(_PRIVATE.search(text) is not None) or text)
    return any(found)


def map_texts(value: object, function: Callable[[str], str]) -> Any:
    """Return a copy of a value with all texts below it, keys of dicts included, replaced by function(text)."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {map_texts(key, function): map_texts(item, function) for key, item in value.items()}
    return [map_texts(item, function) for item in value] if isinstance(value, list) else value


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
