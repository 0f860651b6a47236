"""Starts a server that one process alone asks, on 127.0.0.1 with a new API key, and checks who can reach it.

The server may have parts on other nodes of the job, which are started there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import psutil

from longhaul.config.site_serving_config import Serving
from longhaul.serving.api_key import create_key_file
from longhaul.serving.check_access import check_address, check_keys, listening_addresses
from longhaul.serving.engines import ENGINES, LOOPBACK, Server, ServerShape
from longhaul.serving.link_server_nodes import NodeLink
from longhaul.serving.server_process import free_port, run_until_first_node_ends, running_server


@dataclass(frozen=True)
class LocalServer:
    """A server that answers.

    key:        its API key; None for an engine without keys
    guardian:   the process above all of its processes
    start_s:    seconds from its start to its first answer
    listens_at: addresses of its processes, as address:port
    """

    server: Server
    key: str | None
    guardian: psutil.Process
    start_s: float
    listens_at: list[str]


@contextmanager
def local_server(
    serving: Serving,
    model: Path,
    name: str,
    dtype: Literal["fp32", "bf16", "fp8"],
    shape: ServerShape,
    start_timeout_s: float,
    link: NodeLink | None = None,
) -> Iterator[LocalServer]:
    """Start a server of a Hugging Face folder, yield it when it answers, and stop all of its processes at the end.

    link: of the first node to the others, which call run_part; None: the server has one node

    Raises:
        UserError: it does not start, listens at another address, or answers without its key.
    """
    with TemporaryDirectory() as private:
        key_file = Path(private) / "api_key.yaml" if ENGINES[serving.engine].accepts_key else None
        key = create_key_file(key_file) if key_file else None
        port = free_port(LOOPBACK)
        server = Server(serving, model.absolute(), name, dtype, LOOPBACK, port, shape, key_file)
        server.place_files()
        start = time.monotonic()
        with running_server(server, key, start_timeout_s, link) as guardian:
            start_s = time.monotonic() - start
            listens_at = listening_addresses(guardian)
            check_address(server, listens_at)
            if key:
                check_keys(server, key)
            yield LocalServer(server, key, guardian, start_s, listens_at)


def run_part(
    serving: Serving,
    model: Path,
    name: str,
    dtype: Literal["fp32", "bf16", "fp8"],
    shape: ServerShape,
    link: NodeLink,
) -> None:
    """Run the part of a local server on another node than the first one, until the first one's process ends."""
    host = link.own_address
    run_until_first_node_ends(Server(serving, model.absolute(), name, dtype, host, free_port(host), shape), link)
