"""Says how each inference engine is started: the words of its command, its environment, and what it can do.

| engine       | API key                          | log probabilities | started as                                |
| transformers | none: it must listen on loopback | no                | python -m transformers.cli.transformers   |
| vllm         | VLLM_API_KEY, and require_key.py | yes               | python -m vllm.entrypoints.cli.main serve |
| sglang       | in a file, option --config       | yes               | python -m sglang.launch_server            |

Read from transformers 5.23, vLLM 0.32 and SGLang 0.5.23. No engine gets a key on its command line, which every user of a
node can read.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longhaul.config.serve_config import Serve
from longhaul.config.site_serving_config import EngineName, Serving
from longhaul.serving import require_key

LOOPBACK = "127.0.0.1"
# By default, vLLM and SGLang compute with 16 bits even where config.json says fp32. FP8 weights are multiplied as bf16.
_COMPUTE = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}


@dataclass(frozen=True)
class Engine:
    """Features of one kind of engine.

    accepts_key:             it refuses requests without the API key
    gives_log_probabilities: /v1/completions takes token ids, and returns log probabilities of the prompt and of the answer
    spreads_models:          it spreads a model over several GPUs and nodes as ServerShape says
    """

    accepts_key: bool
    gives_log_probabilities: bool
    spreads_models: bool


ENGINES: dict[EngineName, Engine] = {
    "transformers": Engine(accepts_key=False, gives_log_probabilities=False, spreads_models=False),
    "vllm": Engine(accepts_key=True, gives_log_probabilities=True, spreads_models=True),
    "sglang": Engine(accepts_key=True, gives_log_probabilities=True, spreads_models=True),
}


@dataclass(frozen=True)
class ServerShape:
    """Layout of a server over GPUs, and the length and number of its requests.

    tensor:               GPUs over which each layer is spread
    pipeline:             groups of layers, each on GPUs of its own
    expert_parallel:      each GPU of a layer holds whole experts, instead of a part of every expert
    context_tokens:       most tokens of a prompt and its answer; None: as many as the model has positions
    max_running_requests: most requests that are answered at the same time; None: as the engine chooses
    """

    nodes: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert_parallel: bool = False
    context_tokens: int | None = None
    max_running_requests: int | None = None

    @classmethod
    def of_job(cls, serve: Serve, nodes: int, tensor: int, pipeline: int, context_tokens: int | None) -> ServerShape:
        """Return the shape of a server that a job starts for itself, with the limits of the section `serve`."""
        return cls(
            nodes=nodes,
            tensor=tensor,
            pipeline=pipeline,
            expert_parallel=serve.expert_parallel,
            context_tokens=context_tokens,
            max_running_requests=serve.max_running_requests,
        )


@dataclass(frozen=True)
class Server:
    """One server of a model.

    model:      the exported Hugging Face folder, as an absolute path
    name:       what requests call the model, where the engine lets it be chosen
    dtype:      the export's precision: fp32, bf16 or fp8
    host, port: where it listens; several nodes: on the first of them
    key_file:   the file of api_key.py; None for an engine without keys
    drain_s:    time for accepted requests after SIGTERM. SGLang looks every 5 s whether they are done
    """

    serving: Serving
    model: Path
    name: str
    dtype: Literal["fp32", "bf16", "fp8"]
    host: str
    port: int
    shape: ServerShape = ServerShape()
    key_file: Path | None = None
    drain_s: int = 0

    @property
    def engine(self) -> Engine:
        return ENGINES[self.serving.engine]

    @property
    def url(self) -> str:
        """The address for clients, without /v1."""
        return f"http://{self.host}:{self.port}"

    @property
    def health_url(self) -> str:
        """An address that answers 200 when the model is loaded; no engine asks for a key there."""
        return f"{self.url}/health"

    @property
    def requested_model(self) -> str:
        """The value of `model` in requests. `transformers serve` accepts only the folder that it was started with."""
        return str(self.model) if self.serving.engine == "transformers" else self.name

    def place_files(self) -> None:
        """Copy what vLLM imports beside the key file, which a container of the engine must bind anyway."""
        if self.serving.engine == "vllm" and self.key_file:
            shutil.copyfile(require_key.__file__, self.key_file.with_name(Path(require_key.__file__).name))

    def command(self, node_rank: int = 0, leader: tuple[str, int] | None = None) -> tuple[str, ...]:
        """Return the words that start the server's part on one of its nodes, without the API key.

        leader: address of the first node, and a port there at which the other nodes meet it; None: the server has one node
        """
        python = self.serving.python or (sys.executable,)
        address = ("--host", self.host, "--port", str(self.port))
        if self.serving.engine == "transformers":
            words = ("transformers.cli.transformers", "serve", str(self.model))
        elif self.serving.engine == "vllm":
            words = (*self._vllm(), *(_vllm_node(self.shape, node_rank, leader) if leader else ()))
        else:
            words = (*self._sglang(), *(_sglang_node(self.shape, node_rank, leader) if leader else ()))
        return (*python, "-m", *words, *address, *self.serving.options)

    def environment(self, key: str | None) -> dict[str, str]:
        """Return the variables that the engine needs in addition to those of the job.

        key: the API key; None for an engine without keys
        """
        variables = dict(self.serving.environment)
        if self.serving.engine == "vllm":
            # Without these variables, vLLM sends usage statistics to a public address.
            variables |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
            variables |= {"VLLM_API_KEY": key} if key else {}
            # Without it, the processes of vLLM meet at the address of the default route, which may be public.
            variables |= {"VLLM_HOST_IP": self.host} if self.shape.nodes == 1 else {}
            variables |= {"PYTHONPATH": self._python_path(self.key_file.parent)} if self.key_file else {}
        return variables

    @staticmethod
    def _python_path(folder: Path) -> str:
        return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))

    def _vllm(self) -> list[str]:
        shape = self.shape
        return [
            *("vllm.entrypoints.cli.main", "serve", str(self.model), "--served-model-name", self.name),
            *("--tensor-parallel-size", str(shape.tensor), "--pipeline-parallel-size", str(shape.pipeline)),
            *(["--enable-expert-parallel"] if shape.expert_parallel else []),
            *("--dtype", _COMPUTE[self.dtype]),
            *_option("--max-model-len", shape.context_tokens),
            *_option("--max-num-seqs", shape.max_running_requests),
            *_option("--shutdown-timeout", self.drain_s or None),
            "--disable-uvicorn-access-log",
            *_option(
                "--middleware", f"{require_key.__name__.rpartition('.')[2]}.RequireKey" if self.key_file else None
            ),
        ]

    def _sglang(self) -> list[str]:
        shape = self.shape
        return [
            *("sglang.launch_server", "--model-path", str(self.model), "--served-model-name", self.name),
            *("--tp-size", str(shape.tensor), "--pp-size", str(shape.pipeline)),
            *_option("--ep-size", shape.tensor if shape.expert_parallel else None),
            *("--dtype", _COMPUTE[self.dtype]),
            *_option("--context-length", shape.context_tokens),
            *_option("--max-running-requests", shape.max_running_requests),
            # At level info, SGLang logs all its settings, the API key among them.
            *("--log-level", "warning"),
            *_option("--config", self.key_file),
        ]


def _option(name: str, value: object | None) -> tuple[str, ...]:
    return () if value is None else (name, str(value))


def _vllm_node(shape: ServerShape, node_rank: int, leader: tuple[str, int]) -> list[str]:
    """Return the options of vLLM's own start over several nodes; only the first one answers requests."""
    host, port = leader
    place = ["--nnodes", str(shape.nodes), "--node-rank", str(node_rank)]
    return [*place, "--master-addr", host, "--master-port", str(port), *(["--headless"] if node_rank else [])]


def _sglang_node(shape: ServerShape, node_rank: int, leader: tuple[str, int]) -> list[str]:
    host, port = leader
    return ["--nnodes", str(shape.nodes), "--node-rank", str(node_rank), "--dist-init-addr", f"{host}:{port}"]
