"""An HTTP server of this machine in the place of a tracker's: it answers what a test says, and can fall silent or break."""

from __future__ import annotations

import gzip
import json
from base64 import b64decode
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

AT_ONCE = {"MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0", "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0"}
"""The environment of an MLflow client that asks again without a pause."""

Answer = Callable[[str, Any], tuple[int, Any]]
"""(path, JSON of the request) -> (status, JSON)"""


class Server(ThreadingHTTPServer):
    """At `url`; `answer` may be changed at any time, `asked` holds every request's path, `credentials` what was sent as Basic."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.asked: list[str] = []
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
        self.server.asked.append(path)
        kind, _, token = (self.headers["Authorization"] or "").partition(" ")
        if kind == "Basic":
            self.server.credentials.add(b64decode(token).decode())
        status, content = self.server.answer(path, json.loads(body) if body else None)
        said = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        if status == 503:
            self.send_header("Retry-After", "3600")
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST


def broken(path: str, request: Any) -> tuple[int, Any]:
    """Of a server that asks to be left alone for an hour."""
    return 503, {}


def mlflow_answer(path: str, request: Any) -> tuple[int, Any]:
    """As an MLflow server that begins a run and takes its metrics."""
    info = {"run_id": "run-1", "experiment_id": "1", "status": "RUNNING", "lifecycle_stage": "active"}
    answers = {
        "experiments/get-by-name": {"experiment": {"experiment_id": "1", "name": "small", "lifecycle_stage": "active"}},
        "runs/create": {"run": {"info": info, "data": {}}},
    }
    return 200, answers.get(path.removeprefix("/api/2.0/mlflow/"), {})


def wandb_answer(path: str, request: Any) -> tuple[int, Any]:
    """As a W&B server that begins a run and takes its history, but no files."""
    project = {"id": "1", "name": "small", "entity": {"id": "1", "name": "me"}}
    bucket = {"id": "1", "name": "run", "displayName": "base", "project": project}
    answers = {
        "RunResumeStatus": {"model": None},
        "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
        "CreateRunFiles": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}},
    }
    return 200, {"data": answers.get(request["operationName"], {})} if path == "/graphql" else {}


def wandb_answer_of_a_deleted_run(path: str, request: Any) -> tuple[int, Any]:
    """W&B's own words."""
    if request["operationName"] != "UpsertBucket":
        return wandb_answer(path, request)
    told = "run me/small/run was previously created and deleted; try a new run name"
    return 409, {"errors": [{"message": told}], "data": {"upsertBucket": None}}
