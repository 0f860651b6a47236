"""The file endpoint.json of a serving job: where the served model answers, and which process serves it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longhaul.artifacts.artifact_schemas import Artifact
from longhaul.artifacts.leases import LeaseOwner
from longhaul.artifacts.shared_file_system import exists_on_server
from longhaul.errors import UserError


@dataclass(frozen=True)
class Endpoint(Artifact):
    """`results/<run>/jobs/serve-<stage>/endpoint.json`: the server of a stage's export. It exists while the server runs.

    url:       address of the OpenAI API, with /v1
    model:     value of `model` in requests
    engine:    transformers | vllm | sglang
    key_file:  file with the API key; None: the engine supports no key, and listens on 127.0.0.1 only
    ready:     the model is loaded, and requests are answered
    owner:     the process that started the engine
    """

    url: str
    model: str
    engine: str
    key_file: str | None
    ready: bool
    owner: LeaseOwner

    @property
    def place(self) -> str:
        """Return the URL, and for an address that each host has, the host that it is on."""
        return f"{self.url} (on {self.owner.host} only)" if self.url.startswith("http://127.") else self.url


def read_endpoint(path: Path) -> Endpoint | None:
    """Read endpoint.json; None if it is missing or damaged, or if its process has ended without removing it."""
    try:
        endpoint = Endpoint.read(path) if exists_on_server(path) else None
    except UserError:
        return None
    return None if endpoint is None or endpoint.owner.is_dead() else endpoint
