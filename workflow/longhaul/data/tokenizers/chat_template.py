"""Renders conversations, each within 10 s of CPU time, and finds the assistant's spans that count in the loss.

A template with {% generation %} markers marks these spans itself. For any other template, an assistant turn starts where
the rendering of all messages before it, with a generation prompt, ends. It ends with the last EOS in the rendering of all
messages up to it. This is correct only for templates that never change the rendering of earlier messages, so every
conversation is checked. One change is allowed: a template may leave out the beginning of an earlier turn (its reasoning).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from longhaul.compat.transformers_chat_templates import render_chat
from longhaul.config.shipped_files import CHAT_TEMPLATES
from longhaul.data.readers.conversations import Message, Tool
from longhaul.data.readers.rows_and_file_ranges import BadData
from longhaul.data.tokenizers.control_tokens import ControlTokens, Marks, contain_private_characters
from longhaul.runtime.cpu_time_limit import cpu_time_limit
from longhaul.runtime.memory_limit import memory_limit

Span = tuple[int, int]
"""[start, end) in a text, in characters or in bytes of UTF-8."""

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
RENDER_LIMIT_S = 10
RENDER_MEMORY_BYTES = 10**9
REMEDY = f"give a template with {{% generation %}} markers as tokenizer.chat_template ({CHAT_TEMPLATES} has some)"


class Conversation(NamedTuple):
    """Messages in the form that a template reads, and the functions that the assistant may call.

    where: the location for error messages.
    """

    messages: list[Message]
    tools: list[Tool] | None
    where: object

    def until(self, stop: int) -> Conversation:
        """Return the conversation of the first `stop` messages."""
        return self._replace(messages=self.messages[:stop])


class Rendered(NamedTuple):
    """The text of a conversation and the spans of the assistant turns in the loss, EOS included, in characters.

    has_control_text: the data contains the text of a control token. `text` is then what ControlTokens.exchange returns.
    """

    text: str
    turns: list[list[Span]]
    conversation: Conversation
    has_control_text: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the special tokens that it may use ("eos_token": "<|endoftext|>", …).

    control_tokens: tokens whose text in a message stays text.
    """

    template: str
    special_tokens: dict[str, str]
    control_tokens: ControlTokens = field(default_factory=lambda: ControlTokens(()))

    @classmethod
    def load(cls, folder: Path, control_tokens: ControlTokens | None = None) -> ChatTemplate:
        """Read the template of a tokenizer folder that longhaul.data.tokenizers.build_tokenizer wrote."""
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        special = {key: value for key, value in settings.items() if key.endswith("_token")}
        tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in special.items()}
        text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        named = {key: value for key, value in tokens.items() if isinstance(value, str)}
        return cls(text, named, control_tokens or ControlTokens(()))

    @property
    def eos(self) -> str:
        """The text of the token that ends a turn."""
        return self.special_tokens["eos_token"]

    def render(self, messages: list[Message], where: object, tools: list[Tool] | None = None) -> Rendered:
        """Return the conversation's text and the turns of the assistant messages whose weight is not 0.

        Raises:
            BadData: with the location `where`: the template refuses the conversation, does not end an assistant turn
                with EOS, or drops a part of the last assistant message.
        """
        conversation = self._prepare(messages, tools, where)
        weights = [message.get("weight", 1) for message in messages]
        data = [tools, [_without_role(message) for message in conversation.messages]]
        if not self._has_control_text(conversation):
            return self._render_turns(conversation, weights)
        if contain_private_characters(data):
            message = "text of control tokens together with private characters (U+100000 to U+10FFFD)"
            raise _refused(f"{where}: {message}", "remove the private characters")
        rendered = self._render_turns(self._hide_control_text(conversation), weights)
        if self.control_tokens.restore(rendered.text) != self.text(conversation):
            message = f"{where}: the chat template changes the text of a control token in a message"
            raise _refused(message, "remove that text, or set allow_control_tokens: true")
        return Rendered(self.control_tokens.exchange(rendered.text), rendered.turns, conversation, True)

    def _has_control_text(self, conversation: Conversation) -> bool:
        tokens = self.control_tokens
        answers = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
        others = [_without_answer(message) for message in conversation.messages]
        return tokens.occur_in([conversation.tools, others]) or any(map(tokens.occur_in_answer, answers))

    def _hide_control_text(self, conversation: Conversation) -> Conversation:
        return conversation._replace(
            messages=[self._with_hidden_text(message) for message in conversation.messages],
            tools=self.control_tokens.hide(conversation.tools),
        )

    def _with_hidden_text(self, message: Message) -> Message:
        hidden = {"role": message["role"], **self.control_tokens.hide(_without_role(message))}
        if message["role"] == "assistant":
            hidden["content"] = self.control_tokens.hide_in_answer(message["content"])
        return hidden

    def _prepare(self, messages: list[Message], tools: list[Tool] | None, where: object) -> Conversation:
        """Return a conversation in the form that the template can read.

        The template does not see weights of answers. Some templates read the arguments of tool calls as an object, as the
        documentation of transformers has them, and others as JSON text, as OpenAI has them.

        Raises:
            BadData: the template refuses both forms.
        """
        seen = [_without_weight(message) if message["role"] == "assistant" else message for message in messages]
        conversation = Conversation(seen, tools, where)
        if not any("tool_calls" in message for message in messages):
            return conversation
        try:
            if not self._prints_objects(conversation):
                return conversation
            refusal = _refused(f"{where}: the chat template writes the arguments of a tool call not as JSON", REMEDY)
        except BadData as error:
            refusal = error
        as_text = conversation._replace(messages=[_with_arguments(message, _json_text) for message in seen])
        try:
            self.text(as_text)
        except BadData:
            raise refusal from None
        return as_text

    def _prints_objects(self, conversation: Conversation) -> bool:
        """Return whether the template writes a call's arguments in Python's notation ({'city': 'Paris'}), not as JSON.

        A message may quote this notation. What the template writes itself changes with the arguments, a quotation does not.
        """
        if not _contains_objects(self.text(conversation), conversation.messages):
            return False
        marked = conversation._replace(
            messages=[_with_arguments(message, _marked) for message in conversation.messages]
        )
        return _contains_objects(self.text(marked), marked.messages)

    def text(self, conversation: Conversation) -> str:
        """Return the rendered conversation. Raises BadData if the template refuses it."""
        return self._render(conversation)[0]

    def _render_turns(self, conversation: Conversation, weights: list[int]) -> Rendered:
        text, spans = self._render(conversation)
        assistant = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if not assistant:
            return Rendered(text, [], conversation)
        if not _MARKER.search(self.template):
            turns = self._find_turns_by_prefix(conversation, assistant, text)
        elif all(weights[index] for index in assistant):
            turns = [[span] for span in _joined(spans)]
        else:
            turns = self._marked_turns(conversation, assistant, spans)
        self._require_whole_last_turn(conversation, text, turns)
        if len(turns) == len(assistant):
            turns = [turn for turn, index in zip(turns, assistant, strict=True) if weights[index]]
        return Rendered(text, turns, conversation)

    def _render(self, conversation: Conversation, prompt: bool = False) -> tuple[str, list[Span]]:
        """Return the text, and the spans between generation markers (none where the template has no markers)."""
        import jinja2

        try:
            with cpu_time_limit(RENDER_LIMIT_S), memory_limit(RENDER_MEMORY_BYTES):
                return render_chat(
                    self.template, conversation.messages, conversation.tools, prompt, self.special_tokens
                )
        except Exception as error:  # a template is a program: it may raise any exception
            reason = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            message = f"{conversation.where}: the chat template refuses this conversation: {reason}"
            raise _refused(message, "fix the conversation, or " + REMEDY) from None

    def _marked_turns(self, conversation: Conversation, assistant: list[int], spans: list[Span]) -> list[list[Span]]:
        """Return the marked spans of each assistant message: those that its message adds."""
        counts = [0, *(len(self._render(conversation.until(index + 1))[1]) for index in assistant)]
        if counts[-1] != len(spans):
            message = f"{conversation.where}: cannot find which marked text of the chat template is from which message"
            raise _refused(message, "set no message's weight to 0, or use another chat template")
        return [spans[first:stop] for first, stop in pairwise(counts)]

    def _find_turns_by_prefix(self, conversation: Conversation, assistant: list[int], text: str) -> list[list[Span]]:
        turns: list[list[Span]] = []
        end = 0
        for index in assistant:
            prompt = self._render(conversation.until(index), prompt=True)[0]
            if not text.startswith(prompt) or len(prompt) < end:
                raise self._changed_text(conversation, index)
            end = self._turn_end(conversation, index, text, len(prompt))
            turns.append([(len(prompt), end)])
        return turns

    def _turn_end(self, conversation: Conversation, index: int, text: str, start: int) -> int:
        """Return where message `index`, whose turn starts at `start`, ends: behind the last EOS of its rendering."""
        is_last = index == len(conversation.messages) - 1
        until = text if is_last else self.text(conversation.until(index + 1))
        if (last_eos := until.rfind(self.eos, start)) < 0:
            raise self._missing_eos(conversation.where)
        if text.startswith(until):
            return last_eos + len(self.eos)
        # Templates that drop the reasoning of earlier turns: this turn lacks its beginning when others follow.
        if (found := text.find(self.eos, start)) < 0:
            raise self._missing_eos(conversation.where)
        end = found + len(self.eos)
        if not until[start : last_eos + len(self.eos)].endswith(text[start:end]):
            raise self._changed_text(conversation, index)
        return end

    def _changed_text(self, conversation: Conversation, index: int) -> BadData:
        message = "cannot find the assistant's tokens: the chat template changes the text before message"
        return _refused(f"{conversation.where}: {message} {index + 1}", REMEDY)

    def _require_whole_last_turn(self, conversation: Conversation, text: str, turns: list[list[Span]]) -> None:
        written = "".join(text[start:end] for turn in turns for start, end in turn)
        if not written.rstrip().endswith(self.eos):
            raise self._missing_eos(conversation.where)
        last = next(message for message in reversed(conversation.messages) if message["role"] == "assistant")
        if without_spaces(last["content"]) not in without_spaces(written):
            raise _refused(
                f"{conversation.where}: the chat template drops a part of the last assistant message (most often the "
                "reasoning), so the model would not be trained on it",
                REMEDY,
            )

    def _missing_eos(self, where: object) -> BadData:
        return _refused(
            f"{where}: the chat template does not end an assistant turn with the tokenizer's EOS {self.eos!r}: "
            "the model would never learn to stop",
            REMEDY + ", or set the template's end-of-turn token as eos_token in tokenizer_config.json",
        )


def _without_role(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "role"}


def _without_answer(message: Message) -> Message:
    """Return a message without its role, and without the content of an answer."""
    is_answer = message["role"] == "assistant"
    return {key: value for key, value in message.items() if key != "role" and not (is_answer and key == "content")}


def _without_weight(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "weight"}


def _with_arguments(message: Message, function: Callable[[Any], object]) -> Message:
    """Return a message with function(arguments) as the arguments of its calls."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": function(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _json_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _marked(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments that no message quotes."""
    return {**arguments, "longhaul_marks_arguments": True}


def _contains_objects(text: str, messages: list[Message]) -> bool:
    """Return whether a text contains Python's notation of a call's arguments, and this notation is not JSON, too."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    notations = [(str(call["function"]["arguments"]), _json_text(call["function"]["arguments"])) for call in calls]
    return any(python != as_json and python in text for python, as_json in notations)


def _joined(spans: list[Span]) -> list[Span]:
    """Return spans, with those that touch each other as one."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def without_spaces(text: str) -> str:
    """Return a text without spaces and line breaks."""
    return "".join(text.split())


def _refused(message: str, hint: str) -> BadData:
    return BadData.with_reason("chat template", message, hint)


def without_reasoning(text: str, spans: list[Span], marks: Marks) -> list[Span]:
    """Return the spans without <think>…</think>, and without everything after a <think> that is not closed.

    A </think> without <think> removes the text from the start of its span, because the template may write <think>
    before the span.

    marks: <think> and </think>, or what the text has in their place
    """
    begin_mark, end_mark = marks
    kept: list[Span] = []
    for start, end in spans:
        position = start
        while (close := text.find(end_mark, position, end)) >= 0:
            opened = text.find(begin_mark, position, close)
            kept.append((position, opened if opened >= 0 else position))
            position = close + len(end_mark)
        unclosed = text.find(begin_mark, position, end)
        kept.append((position, unclosed if unclosed >= 0 else end))
    return [(start, end) for start, end in kept if start < end]
