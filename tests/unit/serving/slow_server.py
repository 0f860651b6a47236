"""A server without a model, for tests of processes: python slow_server.py PORT PIDS starts a worker, writes pids, answers."""

from __future__ import annotations

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


def main(port: int, pids: Path) -> None:
    # A worker in a session of its own that ignores SIGTERM survives everything but a search for it.
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    worker = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    pids.write_text(f"{os.getpid()} {worker.pid}")
    HTTPServer(("127.0.0.1", port), Healthy).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
