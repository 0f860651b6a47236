"""An HTTP server on this machine in place of a tracker's. It returns what a test chooses, errors included."""

from __future__ import annotations

import gzip
import json
from base64 import b64decode
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NO_BACKOFF = {"MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0", "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0"}
"""The environment of an MLflow client that retries without a pause."""

Answer = Callable[[str, Any], tuple[int, Any]]
"""(path, JSON of the request) -> (status, JSON)"""


class Server(ThreadingHTTPServer):
    """A tracker server at `url`.

    answer:      returns the responses; a test may replace it at any time
    requests:    the path of every request
    credentials: what was sent as Basic authorization
    """

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[str] = []
        self.credentials: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        path = self.path.partition("?")[0]
        self.server.requests.append(path)
        kind, _, token = (self.headers["Authorization"] or "").partition(" ")
        if kind == "Basic":
            self.server.credentials.add(b64decode(token).decode())
        status, content = self.server.answer(path, json.loads(body) if body else None)
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 503:
            self.send_header("Retry-After", "3600")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST


def unavailable(path: str, request: Any) -> tuple[int, Any]:
    """Answer as a server that is unavailable and asks for an hour without requests."""
    return 503, {}


def mlflow_answer(path: str, request: Any) -> tuple[int, Any]:
    """Answer as an MLflow server that begins a run and accepts its metrics."""
    info = {"run_id": "run-1", "experiment_id": "1", "status": "RUNNING", "lifecycle_stage": "active"}
    answers = {
        "experiments/get-by-name": {"experiment": {"experiment_id": "1", "name": "small", "lifecycle_stage": "active"}},
        "runs/create": {"run": {"info": info, "data": {}}},
    }
    return 200, answers.get(path.removeprefix("/api/2.0/mlflow/"), {})


def wandb_answer(path: str, request: Any) -> tuple[int, Any]:
    """Answer as a W&B server that begins a run and accepts its history, but no files."""
    project = {"id": "1", "name": "small", "entity": {"id": "1", "name": "me"}}
    bucket = {"id": "1", "name": "run", "displayName": "base", "project": project}
    answers = {
        "RunResumeStatus": {"model": None},
        "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
        "CreateRunFiles": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}},
    }
    return 200, {"data": answers.get(request["operationName"], {})} if path == "/graphql" else {}


def wandb_answer_of_a_deleted_run(path: str, request: Any) -> tuple[int, Any]:
    """Answer as a W&B server whose run was deleted, with its own message."""
    if request["operationName"] != "UpsertBucket":
        return wandb_answer(path, request)
    message = "run me/small/run was previously created and deleted; try a new run name"
    return 409, {"errors": [{"message": message}], "data": {"upsertBucket": None}}
