"""Conversations -> text through a chat template, and which stretches of that text the assistant wrote.

A template that marks them with {% generation %} says so itself. For any other, a turn of the assistant starts where the
rendering of all messages before it, with a generation prompt, ends, and it ends with the first EOS after that. This
holds only for templates that never rewrite earlier text, so it is checked for every conversation.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from longhaul.data.readers.documents import Message
from longhaul.data.readers.rows import BadData

Span = tuple[int, int]
_THINK, _THINK_END = "<think>", "</think>"
_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REMEDY = "give a template with {% generation %} markers as tokenizer.chat_template (templates/chat has some)"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with the special tokens it may name ("eos_token": "<|endoftext|>", …)."""

    template: str
    special_tokens: dict[str, str]

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Reads the template of a tokenizer folder that longhaul.data.tokenizers.build_tokenizer wrote."""
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        named = {key: value for key, value in settings.items() if key.endswith("_token")}
        tokens = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
        text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(text, {key: value for key, value in tokens.items() if isinstance(value, str)})

    def render(self, messages: list[Message], where: object) -> tuple[str, list[Span]]:
        """The conversation's text and the assistant's stretches of it, in characters, EOS included.

        Raises UserError (naming `where`) when the template refuses the conversation, when it does not end an
        assistant turn with EOS, or when it drops what the last one says.
        """
        text, spans = self._render(messages, where)
        if not _MARKER.search(self.template):
            spans = self._spans_by_prefix(messages, text, where)
        if any(message["role"] == "assistant" for message in messages):
            self._check(messages, text, spans, where)
        return text, spans

    def _render(self, messages: list[Message], where: object, prompt: bool = False) -> tuple[str, list[Span]]:
        """Text, and the stretches between generation markers where the template has them."""
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
        except Exception as error:  # a template is a program: it may raise anything
            told = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise _refused(
                f"{where}: the chat template refuses this conversation: {told}", "mend the conversation, or " + _REMEDY
            ) from None
        (text,), (spans,) = rendered
        return text, spans

    def _spans_by_prefix(self, messages: list[Message], text: str, where: object) -> list[Span]:
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], where, prompt=True)[0]
            if not text.startswith(prompt) or (spans and len(prompt) < spans[-1][1]):
                raise _refused(
                    f"{where}: cannot tell which tokens are the assistant's: the chat template rewrites what stands "
                    f"before message {index + 1}",
                    _REMEDY,
                )
            spans.append((len(prompt), self._turn_end(text, len(prompt), where)))
        return spans

    def _turn_end(self, text: str, start: int, where: object) -> int:
        eos = self.special_tokens["eos_token"]
        found = text.find(eos, start)
        if found < 0:
            raise self._no_eos(where)
        return found + len(eos)

    def _check(self, messages: list[Message], text: str, spans: list[Span], where: object) -> None:
        written = "".join(text[start:end] for start, end in spans)
        if not written.rstrip().endswith(self.special_tokens["eos_token"]):
            raise self._no_eos(where)
        last = next(message["content"] for message in reversed(messages) if message["role"] == "assistant")
        if _without_spaces(last) not in _without_spaces(written):
            raise _refused(
                f"{where}: the chat template drops part of the last assistant message (reasoning, most often), so it "
                "would not be trained on",
                _REMEDY,
            )

    def _no_eos(self, where: object) -> BadData:
        eos = self.special_tokens["eos_token"]
        return _refused(
            f"{where}: the chat template does not end an assistant turn with the tokenizer's EOS {eos!r}: "
            "the model would never learn to stop",
            _REMEDY + ", or set the template's end-of-turn token as eos_token in tokenizer_config.json",
        )


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _refused(message: str, hint: str) -> BadData:
    return BadData.because("chat template", message, hint)


def without_reasoning(text: str, spans: list[Span]) -> list[Span]:
    """The stretches without what stands in <think>…</think>, or behind a <think> that nothing closes.

    A template may have opened it before the stretch begins.
    """
    kept: list[Span] = []
    for start, end in spans:
        place = start
        while (stop := text.find(_THINK_END, place, end)) >= 0:
            opened = text.find(_THINK, place, stop)
            kept.append((place, opened if opened >= 0 else place))
            place = stop + len(_THINK_END)
        unclosed = text.find(_THINK, place, end)
        kept.append((place, unclosed if unclosed >= 0 else end))
    return [(start, end) for start, end in kept if start < end]
