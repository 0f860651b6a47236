"""Asks a server through its OpenAI interface: streamed greedy answers with the times of their pieces, and scores of prompts."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from longhaul.errors import UserError
from longhaul.serving.engines import Server

Prompt = list[int] | str
"""Token ids, or text for an engine that takes no ids."""
_ALTERNATIVES = 5
_NO_DATA_S = 600.0


@dataclass(frozen=True)
class Token:
    """One token of an answer. alternatives: text -> log probability of the likeliest tokens at its place."""

    text: str
    log_probability: float
    alternatives: dict[str, float]


@dataclass(frozen=True)
class Answer:
    """A complete answer.

    tokens:    empty where the engine gives no log probabilities
    count:     number of tokens
    arrived_s: seconds from the request to each piece of the text
    """

    text: str
    finish_reason: str
    tokens: tuple[Token, ...]
    count: int
    arrived_s: tuple[float, ...]


@dataclass(frozen=True)
class Connection:
    """An open client of a server."""

    server: Server
    client: httpx2.AsyncClient

    async def answer(self, prompt: Prompt, most_tokens: int) -> Answer:
        """Return the streamed greedy answer to a prompt.

        vLLM and SGLang continue after an end of text. A model that ends its answers soon would else be under no load.

        Raises:
            UserError: the server refuses the request, or the answer ends before it is complete.
        """
        body: dict[str, Any] = self._body(prompt, most_tokens) | {"stream": True}
        if self.server.engine.gives_log_probabilities:
            body |= {"logprobs": _ALTERNATIVES, "stream_options": {"include_usage": True}, "ignore_eos": True}
        start = time.monotonic()
        pieces: list[tuple[float, dict[str, Any]]] = []
        try:
            async with self.client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _refused(response)
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        pieces.append((time.monotonic() - start, json.loads(line.removeprefix("data: "))))
        except httpx2.HTTPError as error:
            raise _lost(f"{type(error).__name__}: {error}") from None
        return read_answer(pieces)

    async def score(self, ids: list[int]) -> list[float]:
        """Return the log probabilities that the served model gives to the second and all later tokens of a prompt.

        Raises:
            UserError: the server refuses the request, or gives no log probabilities.
        """
        body = self._body(ids, 1) | {"echo": True, "logprobs": 1}
        try:
            response = await self.client.post("/v1/completions", json=body)
        except httpx2.HTTPError as error:
            raise _lost(f"{type(error).__name__}: {error}") from None
        if response.status_code != 200:
            raise _refused(response)
        scores = (response.json()["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
        if len(scores) < len(ids) or None in scores[1 : len(ids)]:
            raise UserError(
                f"the server returned {len(scores)} log probabilities for a prompt of {len(ids)} tokens",
                "use a release of the engine that answers `echo` with `logprobs`; the how-to names those that were tested",
            )
        return scores[1 : len(ids)]

    def _body(self, prompt: Prompt, most_tokens: int) -> dict[str, Any]:
        return {"model": self.server.requested_model, "prompt": prompt, "max_tokens": most_tokens, "temperature": 0}


@asynccontextmanager
async def connection(server: Server, key: str | None) -> AsyncIterator[Connection]:
    """Open a client; the API key is in the header of its requests alone."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=None)
    timeout = httpx2.Timeout(_NO_DATA_S)
    # A proxy of the centre does not know this address.
    async with httpx2.AsyncClient(
        base_url=server.url, headers=headers, limits=limits, timeout=timeout, trust_env=False
    ) as client:
        yield Connection(server, client)


def read_answer(pieces: list[tuple[float, dict[str, Any]]]) -> Answer:
    """Return the answer that the pieces of a stream make up. pieces: seconds since the request, and the JSON object.

    Raises:
        UserError: the stream holds an error, or ends without a finish reason.
    """
    text, reason, tokens, arrived, count = "", "", [], [], 0
    for seconds, piece in pieces:
        if "error" in piece:
            raise _lost(str(piece["error"]))
        count = (piece.get("usage") or {}).get("completion_tokens", count)
        for choice in piece.get("choices", []):
            text += choice.get("text") or ""
            reason = choice.get("finish_reason") or reason
            tokens += _tokens(choice.get("logprobs") or {})
            if choice.get("text"):
                arrived.append(seconds)
    if not reason:
        raise _lost("it ended without a finish reason")
    return Answer(text, reason, tuple(tokens), count or len(tokens) or len(arrived), tuple(arrived))


def _tokens(scores: dict[str, Any]) -> list[Token]:
    columns = [scores.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs")]
    return [Token(text, value, alternatives or {}) for text, value, alternatives in zip(*columns, strict=False)]


def _refused(response: httpx2.Response) -> UserError:
    return UserError(
        f"the server answered a request with HTTP status {response.status_code}: {response.text[:300]}",
        "what it printed is above",
    )


def _lost(cause: str) -> UserError:
    return UserError(f"the server lost an answer: {cause}", "what it printed is above")
