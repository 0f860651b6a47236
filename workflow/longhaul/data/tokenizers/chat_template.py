"""Render conversations with a chat template, and find the spans of the text that the assistant wrote.

A template with {% generation %} markers marks these spans itself. For any other template, an assistant turn starts where
the rendering of all messages before it, with a generation prompt, ends. It ends with the first EOS after that.
This is correct only for templates that never change the rendering of earlier messages, so every conversation is checked.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from longhaul.data.readers.read_documents import Message
from longhaul.data.readers.rows_and_file_ranges import BadData

Span = tuple[int, int]
"""[start, end) in a text, in characters or in bytes of UTF-8."""

_THINK, _THINK_END = "<think>", "</think>"
_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REMEDY = "give a template with {% generation %} markers as tokenizer.chat_template (templates/chat has some)"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the special tokens that it may use ("eos_token": "<|endoftext|>", …)."""

    template: str
    special_tokens: dict[str, str]

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Read the template of a tokenizer folder that longhaul.data.tokenizers.build_tokenizer wrote."""
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        special = {key: value for key, value in settings.items() if key.endswith("_token")}
        tokens = {key: value["content"] if isinstance(value, dict) else value for key, value in special.items()}
        text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(text, {key: value for key, value in tokens.items() if isinstance(value, str)})

    def render(self, messages: list[Message], where: object) -> tuple[str, list[Span]]:
        """Return the conversation's text and the spans that the assistant wrote, in characters, EOS included.

        Raises:
            BadData: with the location `where`: the template refuses the conversation, does not end an assistant turn
                with EOS, or drops a part of the last assistant message.
        """
        text, spans = self._render(messages, where)
        if not _MARKER.search(self.template):
            spans = self._find_spans_by_prefix(messages, text, where)
        if any(message["role"] == "assistant" for message in messages):
            self._require_whole_last_turn(messages, text, spans, where)
        return text, spans

    def _render(self, messages: list[Message], where: object, prompt: bool = False) -> tuple[str, list[Span]]:
        """Return the text, and the spans between generation markers (none where the template has no markers)."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **cast(Any, self.special_tokens),
            )
        except Exception as error:  # a template is a program: it may raise any exception
            reason = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise _refused(
                f"{where}: the chat template refuses this conversation: {reason}", "fix the conversation, or " + _REMEDY
            ) from None
        (text,), (spans,) = rendered
        return text, spans

    def _find_spans_by_prefix(self, messages: list[Message], text: str, where: object) -> list[Span]:
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], where, prompt=True)[0]
            if not text.startswith(prompt) or (spans and len(prompt) < spans[-1][1]):
                raise _refused(
                    f"{where}: cannot find the assistant's tokens: the chat template changes the text before message "
                    f"{index + 1}",
                    _REMEDY,
                )
            spans.append((len(prompt), self._turn_end(text, len(prompt), where)))
        return spans

    def _turn_end(self, text: str, start: int, where: object) -> int:
        eos = self.special_tokens["eos_token"]
        found = text.find(eos, start)
        if found < 0:
            raise self._missing_eos(where)
        return found + len(eos)

    def _require_whole_last_turn(self, messages: list[Message], text: str, spans: list[Span], where: object) -> None:
        written = "".join(text[start:end] for start, end in spans)
        if not written.rstrip().endswith(self.special_tokens["eos_token"]):
            raise self._missing_eos(where)
        last = next(message["content"] for message in reversed(messages) if message["role"] == "assistant")
        if _without_spaces(last) not in _without_spaces(written):
            raise _refused(
                f"{where}: the chat template drops a part of the last assistant message (most often the reasoning), so "
                "the model would not be trained on it",
                _REMEDY,
            )

    def _missing_eos(self, where: object) -> BadData:
        eos = self.special_tokens["eos_token"]
        return _refused(
            f"{where}: the chat template does not end an assistant turn with the tokenizer's EOS {eos!r}: "
            "the model would never learn to stop",
            _REMEDY + ", or set the template's end-of-turn token as eos_token in tokenizer_config.json",
        )


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _refused(message: str, hint: str) -> BadData:
    return BadData.with_reason("chat template", message, hint)


def without_reasoning(text: str, spans: list[Span]) -> list[Span]:
    """Return the spans without <think>…</think>, and without everything after a <think> that is not closed.

    A </think> without <think> removes the text from the start of its span, because the template may write <think>
    before the span.
    """
    kept: list[Span] = []
    for start, end in spans:
        position = start
        while (close := text.find(_THINK_END, position, end)) >= 0:
            opened = text.find(_THINK, position, close)
            kept.append((position, opened if opened >= 0 else position))
            position = close + len(_THINK_END)
        unclosed = text.find(_THINK, position, end)
        kept.append((position, unclosed if unclosed >= 0 else end))
    return [(start, end) for start, end in kept if start < end]
