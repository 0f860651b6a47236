"""Tests which contents and keys of messages the chat template writes; unread contents, calls and reasoning stop the job."""

from __future__ import annotations

from collections import Counter

from typing_extensions import TypedDict

from longhaul.data.readers.conversations import REASONING_KEYS, Message, keys_for_template, without_key
from longhaul.data.readers.rows_and_file_ranges import BadData
from longhaul.data.tokenizers.chat_template import REMEDY, ChatTemplate, Conversation, without_spaces

_TRIES = 16
EARLIER_REASONING = "reasoning of an earlier turn"


def require_keys_reached(template: ChatTemplate, conversation: Conversation, text: str) -> int:
    """Raise BadData unless the template writes the tools, all tool calls and the reasoning of the last answer.

    text: the rendered conversation.

    Return the number of earlier turns whose reasoning the template drops, as templates of reasoning models do.
    """
    if conversation.tools and not _changes(template, conversation._replace(tools=None), text):
        raise _unread(conversation.where, "the tools")
    dropped = 0
    answers = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    for index in answers:
        message = conversation.messages[index]
        if calls := message.get("tool_calls"):
            fewer = {"tool_calls": calls[:-1]} if len(calls) > 1 else {}
            rest = {key: value for key, value in message.items() if key != "tool_calls"} | fewer
            if not _changes(template, _with_message(conversation, index, rest), text):
                raise _unread(f"{conversation.where}, message {index + 1}", "the tool calls")
            silent = _with_message(conversation, index, {**message, "content": ""})
            if message["content"] and not _changes(template, silent, text):
                raise _unread(f"{conversation.where}, message {index + 1}", "the content of a message with tool calls")
        if any(key in message for key in REASONING_KEYS):
            rest = {key: value for key, value in message.items() if key not in REASONING_KEYS}
            if not _changes(template, _with_message(conversation, index, rest), text):
                if index == answers[-1]:
                    raise _unread(f"{conversation.where}, message {index + 1}", "the reasoning")
                dropped += 1
    return dropped


def require_contents_reached(template: ChatTemplate, conversation: Conversation, text: str) -> int:
    """Raise BadData unless the template writes the content of every message.

    Some templates leave out roles that they do not know (developer), all system messages but one, or an earlier answer's text
    before </think>. text: the rendered conversation.

    Return the number of earlier turns whose reasoning, written as <think>…</think> in the content, the template drops.
    """
    if _has_contents_in_order(conversation, text):
        return 0
    dropped = 0
    written = without_spaces(text)
    for index, message in enumerate(conversation.messages):
        where = f"{conversation.where}, message {index + 1}"
        if message["role"] == "assistant":
            _require_beginning(template, conversation, index, text)
            dropped += _drops_reasoning(message, written, where)
        elif message["content"].strip():
            silent = _with_message(conversation, index, {**message, "content": ""})
            if not _changes(template, silent, text):
                raise _unread(where, f"the content of this {message['role']} message")
    return dropped


def _has_contents_in_order(conversation: Conversation, text: str) -> bool:
    """Return whether a text contains the contents of all messages one after the other.

    A dropped content may be found in a later message. Then that message, or one behind it, is not found.
    """
    end = 0
    for message in conversation.messages:
        content = message["content"].strip()
        if (found := text.find(content, end)) < 0:
            return False
        end = found + len(content)
    return True


def _require_beginning(template: ChatTemplate, conversation: Conversation, index: int, text: str) -> None:
    """Raise BadData if the template drops what an answer says before </think>, also if another message repeats it."""
    message = conversation.messages[index]
    content = message["content"].strip()
    if "</think>" in content and not content.startswith("<think>"):
        longer = _with_message(conversation, index, {**message, "content": f"More. {content}"})
        if not _changes(template, longer, text):
            raise _unread(f"{conversation.where}, message {index + 1}", "a part of this assistant message")


def _drops_reasoning(message: Message, written: str, where: str) -> bool:
    """Return whether an answer's text is written without the <think>…</think> that it begins with.

    written: the rendered conversation without spaces, because templates change those around the reasoning.
    """
    content = without_spaces(message["content"])
    if content in written:
        return False
    reasoning, _, answer = content.partition("</think>")
    if reasoning.startswith("<think>") and answer in written:
        return True
    if message.get("tool_calls"):
        raise _unread(where, "the content of a message with tool calls")
    raise _unread(where, "a part of this assistant message")


class MessageKeyCount(TypedDict):
    """A key of messages. is_read: the chat template writes it."""

    messages: int
    is_read: bool


class UnreadKeys:
    """Counts the messages with keys that the template does not read.

    A key of a role is tried in the first conversations that have it, until one shows that it is read.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self.start_chunk()

    def start_chunk(self) -> None:
        """Forget all keys: what a chunk's record contains must not depend on earlier chunks."""
        self._messages: Counter[str] = Counter()
        self._tries: Counter[str] = Counter()
        self._read: set[str] = set()

    def add(self, conversation: Conversation, text: str, dropped_reasoning: int) -> None:
        """Count the keys of a rendered conversation."""
        self._messages[EARLIER_REASONING] += dropped_reasoning
        for index, message in enumerate(conversation.messages):
            for path in keys_for_template(message) if len(message) > len(("role", "content")) else ():
                name = ".".join((message["role"], *path))
                self._messages[name] += 1
                if name not in self._read and self._tries[name] < _TRIES:
                    self._tries[name] += 1
                    rest = _with_message(conversation, index, without_key(message, path))
                    if _changes(self._template, rest, text):
                        self._read.add(name)

    def counts(self) -> dict[str, MessageKeyCount]:
        """Return {"role.key": {"messages", "is_read"}} of this chunk."""
        return {
            name: {"messages": count, "is_read": name in self._read}
            for name, count in sorted(self._messages.items())
            if count
        }


def _with_message(conversation: Conversation, index: int, message: Message) -> Conversation:
    messages = [*conversation.messages[:index], message, *conversation.messages[index + 1 :]]
    return conversation._replace(messages=messages)


def _changes(template: ChatTemplate, other: Conversation, text: str) -> bool:
    """Return whether the template gives another text for the other conversation, or refuses it."""
    try:
        return template.text(other) != text
    except BadData:
        return True


def _unread(where: object, what: str) -> BadData:
    message = f"{where}: the chat template does not write {what}, so the model would not be trained on them"
    return BadData.with_reason("chat template", message, REMEDY.replace("a template", "a template that does, best one"))
