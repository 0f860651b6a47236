"""Serves a hub on this machine: the part of the Hugging Face Hub's HTTP API that a download uses.

GET /api/models/<id>/revision/<rev> (or /api/datasets/…) returns the commit and the files; …/tree/<rev>/<folder> lists a
folder; POST …/paths-info/<rev> describes some paths; HEAD and GET of /<id>/resolve/<commit>/<file> (or /datasets/<id>/…)
return one file, with its ETag and commit in the headers.
"""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

COMMIT = "5d0e1c7ab0f54c3b8d0e6e1d1c4b9a7f3e2d1c0b"
_INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree|paths-info)/([^/]+)/?(.*)")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub(ThreadingHTTPServer):
    """Serves <folder>/models/<id>/… and <folder>/datasets/<id>/… on a free port.

    `served` lists the files that were sent, and `tokens` the (path, token) of every request.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.served: list[str] = []
        self.tokens: list[tuple[str, str | None]] = []

    def serve_only(self, folder: Path) -> None:
        """Serve another folder, and forget the requests so far."""
        self.folder = folder
        self.served.clear()
        self.tokens.clear()

    @property
    def url(self) -> str:
        """Address of the hub."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.server.tokens.append((self.path, self.headers["Authorization"]))
        path, _, query = self.path.partition("?")
        path = unquote(path)
        if found := _INFO.fullmatch(path):
            self._send_info(found, parse_qs(query))
        elif found := _FILE.fullmatch(path):
            self._send_file("datasets" if found[1] else "models", found[2], found[4], with_body)
        else:
            self._send(404, b"")

    def _send_info(self, request: re.Match[str], query: dict[str, list[str]]) -> None:
        kind, name, resource, revision, folder = request.groups()
        root = self.server.folder / kind / name
        if not root.is_dir() or revision not in ("main", "v1", COMMIT):
            error = "RepoNotFound" if not root.is_dir() else "RevisionNotFound"
            self._send(404, b'{"error": "not found"}', {"X-Error-Code": error})
        elif resource == "tree" and not (root / folder).is_dir():
            self._send(404, b'{"error": "not found"}', {"X-Error-Code": "EntryNotFound"})
        elif resource == "tree":
            self._send_json(_entries(root, sorted((root / folder).glob("**/*" if _is_true(query) else "*"))))
        elif resource == "paths-info":
            body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self._send_json(_entries(root, [root / path for path in body["paths"] if (root / path).exists()]))
        else:
            files = [entry["path"] for entry in _entries(root, sorted(root.rglob("*"))) if entry["type"] == "file"]
            self._send_json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})

    def _send_json(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, kind: str, name: str, file: str, with_body: bool) -> None:
        path = self.server.folder / kind / name / file
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        body = path.read_bytes()
        if with_body:
            self.server.served.append(f"{name}/{file}")
        status = 200
        if requested := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            status, body = 206, body[int(requested[1]) : int(requested[2]) + 1 if requested[2] else None]
        self._send(status, body, {"ETag": f'"{_digest(body)}"', "X-Repo-Commit": COMMIT}, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, with_body: bool = True) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(body)


def _is_true(query: dict[str, list[str]]) -> bool:
    return query.get("recursive", ["false"])[0].lower() == "true"


def _entries(root: Path, paths: list[Path]) -> list[dict[str, Any]]:
    """Return the hub's descriptions of files and folders."""
    return [
        {
            "type": "file",
            "path": str(path.relative_to(root)),
            "size": path.stat().st_size,
            "oid": _digest(path.read_bytes()),
        }
        if path.is_file()
        else {"type": "directory", "path": str(path.relative_to(root)), "size": 0, "oid": _digest(str(path).encode())}
        for path in paths
    ]


def _digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
