"""A stand-in for vLLM: its options, its API key, its drain after SIGTERM, and a worker process. It serves no model.

With the variable LISTEN_AT it listens at another address than its options name.

A site names it as the Python of the engine: `serving.python: [python, fake_vllm.py]`. The words `-m vllm.… serve …` follow.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ACTIVE: set[int] = set()
DRAINS = threading.Event()


class Handler(BaseHTTPRequestHandler):
    """Answers /health to everybody, and all else to those who know the key.

    /v1/slow takes two seconds. /v1/until-drain is answered while the engine drains.

    While a file `loading` is in the working folder, it answers like a server that loads its model. A file `dies` ends the engine
    after its first answer, and is removed.
    """

    def do_GET(self) -> None:
        ACTIVE.add(threading.get_ident())
        try:
            key = os.environ.get("VLLM_API_KEY")
            allowed = self.path == "/health" or not key or self.headers["Authorization"] == f"Bearer {key}"
            if self.path == "/v1/slow":
                Path("slow-request").touch()
                time.sleep(2)
            if self.path == "/v1/until-drain":
                Path("held-request").touch()
                DRAINS.wait()
                time.sleep(0.5)
            body = json.dumps({"path": self.path}).encode()
            is_loading = Path("loading").exists()
            self.send_response(503 if is_loading else 200 if allowed else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            if Path("dies").exists():
                Path("dies").unlink()
                os._exit(9)
        finally:
            ACTIVE.discard(threading.get_ident())

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    for option in ("host", "port", "shutdown-timeout", "node-rank", "nnodes", "master-addr", "master-port"):
        parser.add_argument(f"--{option}")
    parser.add_argument("--headless", action="store_true")
    found, _ = parser.parse_known_args()
    # The worker ignores SIGTERM, as a worker that hangs does.
    ignore = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", ignore, "worker-of-fake-engine"], start_new_session=True)
    with Path(f"started-{found.node_rank or 0}.txt").open("a") as stream:
        stream.write(json.dumps(sys.argv) + "\n")
    if found.headless:
        signal.pause()
    server = ThreadingHTTPServer((os.environ.get("LISTEN_AT", found.host), int(found.port)), Handler)

    def drain(*_: object) -> None:
        DRAINS.set()

        def wait() -> None:
            end = time.monotonic() + float(found.shutdown_timeout or 0)
            while ACTIVE and time.monotonic() < end:
                time.sleep(0.05)
            server.shutdown()

        threading.Thread(target=wait).start()

    signal.signal(signal.SIGTERM, drain)
    threading.Thread(target=server.serve_forever).start()


if __name__ == "__main__":
    main()
