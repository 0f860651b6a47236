"""A stand-in for vLLM with its completions API: log probabilities, streams and API key, of a model that is a table of bigrams.

A site names it as the Python of the engine: `serving.python: [python, bigram_vllm.py]`. The environment variable FAULT makes
it wrong in one way: another_model, open, exposed, exchange, loss or no_json. With the variable SERVE_EXPORT, it answers with the
exported model instead of the table, as a real engine does.

Over several nodes, the first part answers only after all others have connected to --master-addr and --master-port.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

VOCABULARY = 50
FAULT = os.environ.get("FAULT", "")


def logits(seed: int = 1) -> np.ndarray:
    """Return the logits of each token [V] after each token [V]."""
    return np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY)) * 3


TABLE = logits(2 if FAULT == "another_model" else 1)
LOG_PROBABILITIES = TABLE - np.log(np.exp(TABLE).sum(-1, keepdims=True))


def rows_of_table(ids: list[int]) -> np.ndarray:
    """Return the log probabilities [T, V] of the tokens after each of `ids`."""
    return LOG_PROBABILITIES[[token % VOCABULARY for token in ids]]


class Model:
    """The model that the engine serves. rows: a function like rows_of_table"""

    rows: Callable[[list[int]], np.ndarray] = staticmethod(rows_of_table)

    @classmethod
    def load(cls, folder: str) -> None:
        """Serve the model of a Hugging Face folder."""
        import torch
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

        @torch.no_grad()
        def rows(ids: list[int]) -> np.ndarray:
            return network(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()

        cls.rows = staticmethod(rows)


class Answers:
    """Counts the streams that are answered now; with FAULT=exchange, the second one gets the answer of the first one."""

    lock = threading.Lock()
    prompts: list[list[int]] = []  # noqa: RUF012

    @classmethod
    def begin(cls, prompt: list[int]) -> list[int]:
        with cls.lock:
            cls.prompts.append(prompt)
            return cls.prompts[0] if FAULT == "exchange" and len(cls.prompts) > 1 else prompt

    @classmethod
    def end(cls, prompt: list[int]) -> None:
        with cls.lock:
            cls.prompts.remove(prompt)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send(200 if self.path == "/health" or self._is_allowed() else 401, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            self._send(401, {})
        elif body.get("stream"):
            # Without ignore_eos, every answer ends after one token, as those of a chat model may.
            self._stream(body["prompt"], body["max_tokens"] if body.get("ignore_eos") else 1)
        else:
            prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
            self._send(200, {"choices": [_scored(number, ids, body) for number, ids in enumerate(prompts)]})

    def _is_allowed(self) -> bool:
        return FAULT == "open" or self.headers["Authorization"] == f"Bearer {os.environ['VLLM_API_KEY']}"

    def _send(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Content-Type", "text/plain" if FAULT == "no_json" else "application/json")
        self.end_headers()
        self.wfile.write(text)

    def _stream(self, prompt: list[int], count: int) -> None:
        answered = Answers.begin(prompt)
        self.send_response(200)
        self.end_headers()
        ids = list(answered)
        for place in range(count):
            is_last = place == count - 1
            token, choice = _next(ids)
            ids.append(token)
            choice["finish_reason"] = "length" if is_last and FAULT != "loss" else None
            self._event({"choices": [choice]})
            threading.Event().wait(0.005)
        self._event({"choices": [], "usage": {"completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")
        Answers.end(prompt)

    def _event(self, piece: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


class Listener(ThreadingHTTPServer):
    request_queue_size = 128  # by default, a sixth connection at the same time is refused


def _scored(number: int, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
    """Return what vLLM returns with `echo`: nothing for the first token, then a score for each token and for the answer's."""
    rows = Model.rows(ids)[:-1]
    scores = [None, *(float(row[token % len(row)]) for row, token in zip(rows, ids[1:], strict=True)), -1.0]
    best = [None, *({"best": float(row.max())} for row in rows), {"best": -1.0}]
    return {
        "index": number,
        "text": "x" * body["max_tokens"],
        "logprobs": {"token_logprobs": scores, "top_logprobs": best},
    }


def _next(ids: list[int]) -> tuple[int, dict[str, Any]]:
    """Return the token that follows, and the piece of the stream with it."""
    row = Model.rows(ids)[-1]
    chosen = int(row.argmax())
    alternatives = {f"<{token}>": float(row[token]) for token in np.argsort(-row)[:5]}
    scores = {"tokens": [f"<{chosen}>"], "token_logprobs": [float(row[chosen])], "top_logprobs": [alternatives]}
    return chosen, {"text": f"<{chosen}>", "logprobs": scores}


def meet(address: tuple[str, int], nodes: int, headless: bool) -> list[socket.socket]:
    """Return the connections between the first node's part and the others."""
    if not headless:
        listener = socket.create_server(address)
        return [listener.accept()[0] for _ in range(nodes - 1)]
    while True:
        try:
            return [socket.create_connection(address)]
        except OSError:
            time.sleep(0.1)


def main() -> None:
    if sys.argv[1] == "-c":  # engine_version.py asks
        print(json.dumps({"missing": [], "version": "0.0"}))
        return
    parser = argparse.ArgumentParser()
    for option in ("host", "port", "nnodes", "master-addr", "master-port"):
        parser.add_argument(f"--{option}")
    parser.add_argument("--headless", action="store_true")
    found, _ = parser.parse_known_args()
    if found.nnodes:
        parts = meet((found.master_addr, int(found.master_port)), int(found.nnodes), found.headless)
        print(
            f"{len(parts)} parts of the engine reached, {'without' if found.headless else 'with'} answers", flush=True
        )
    if found.headless:
        threading.Event().wait()
    if "SERVE_EXPORT" in os.environ:
        Model.load(sys.argv[sys.argv.index("serve") + 1])
    host = "0.0.0.0" if FAULT == "exposed" else found.host
    Listener((host, int(found.port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
